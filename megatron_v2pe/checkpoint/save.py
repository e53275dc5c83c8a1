"""Saving a training run: everything it needs to continue, in one checkpoint folder.

parameters in sync -> each rank's own range of model and optimizer, generators -> files of each rank
-> hf/ with the positions that were trained -> checkpoint.json, with the hashes that the ranks computed while
writing -> rename -> latest
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.convert.hf_source import copy_hf_folder
from megatron_v2pe.checkpoint.files.adapter_record import AdapterRecord, write_record
from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, hf_path, state_path, write_info
from megatron_v2pe.checkpoint.files.staging import begin, commit
from megatron_v2pe.checkpoint.hf.config_json import update_positions, update_trained
from megatron_v2pe.checkpoint.hf.name_map import family_name, name_map
from megatron_v2pe.checkpoint.layout_state import generator_shard, topology_of
from megatron_v2pe.checkpoint.retention import prune, step_path, write_latest
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.host_memory import HostCopy
from megatron_v2pe.checkpoint.state.load import stored_bytes
from megatron_v2pe.checkpoint.state.model_state import every_parameter, model_sharded_state_dict
from megatron_v2pe.checkpoint.state.own_ranges import owned_shards
from megatron_v2pe.checkpoint.state.ranks import on_first_rank
from megatron_v2pe.checkpoint.state.save import KnownPlan, StateSave
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)


class CheckpointSave:
    """The save of one step; made while all ranks have finished that step. Collective.

        write    each rank, any thread     its tensors           `copy_state` before it if training continues: what is
        join     all ranks                                       stored is then the state at the time of that call
        commit   each rank, any thread     rank 0 alone: .metadata, hf/, checkpoint.json, rename, latest, old ones
        finish   all ranks                                       the folder, or an error on all of them

    Args:
        run_dir: folder of the run, seen by all ranks.
        model_chunks: wrapped in DDP or not.
        optimizer: mcore's optimizer over them.
        run_state: the rest; its step names the folder.
        ranks: this rank's place in the layout.
        hf_folder: `hf/` of the checkpoint the run started from, or the Hugging Face folder itself.
        keep: newest checkpoints that stay.
        adapters: of a run that trains adapters: what is stored, and which base it belongs to.
        known: `known` of an earlier save of this run.
        trained: values that config.json gets, see `config.trained_settings.trained_values`.

    Raises:
        CheckpointError: no room, or the folder cannot be made. Raised on all ranks.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        model_chunks: Sequence[Any],
        optimizer: Any,
        run_state: RunState,
        ranks: Ranks,
        hf_folder: str | Path,
        keep: int,
        adapters: AdapterRecord | None = None,
        known: KnownPlan | None = None,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.run_state = run_state
        self.keep = keep
        self._trained = trained or {}
        self._hf_folder = Path(hf_folder)
        self._ranks = ranks
        _finish_parameter_gather(model_chunks)
        wanted = adapters.holds if adapters else every_parameter
        states = owned_shards(model_sharded_state_dict(model_chunks, ranks, wanted=wanted), optimizer)
        states["generators"] = generator_shard(ranks)
        num_bytes = stored_bytes(states)
        self.target = step_path(run_dir, run_state.step)
        self._tmp = on_first_rank(lambda: _begin(self.target, num_bytes, adapters))
        self._state = StateSave(state_path(self._tmp), states, known=known)
        self._error: Exception | None = None  # of `commit`

    @property
    def known(self) -> KnownPlan:
        """Makes the planning of the run's next save short."""
        return self._state.known

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank writes, and copies."""
        return self._state.num_bytes

    def copy_state(self, memory: HostCopy) -> None:
        """Copy this rank's tensors; `memory` must not be used for another copy until `write` is done."""
        self._state.copy_tensors(memory)

    def write(self, *, cancelled: threading.Event | None = None) -> None:
        """Write this rank's files. Not collective; an error is raised by `join`.

        Args:
            cancelled: when it is set, writing ends soon, and `join` raises.
        """
        self._state.write(cancelled=cancelled)

    def join(self) -> None:
        """Report to rank 0 what was written. Collective; every rank has returned from `write`.

        Raises:
            CheckpointError: a rank could not write; the previous checkpoint is untouched. Raised on all ranks.
        """
        self._state.join()

    def commit(self) -> None:
        """Make a checkpoint of what all ranks wrote, point `latest` at it, delete old ones: rank 0 does.

        Not collective; an error is raised by `finish`.
        """
        if self._ranks.rank != 0:
            return
        try:
            self._commit(self._state.complete())
            _retain(self.run_dir, self.run_state.step, self.keep)
        except Exception as error:  # raised on all ranks by `finish`
            self._error = error

    def finish(self) -> Path:
        """The finished folder. Collective; every rank has returned from `commit`.

        Raises:
            CheckpointError: the folder could not be completed. Raised on all ranks.
        """
        return on_first_rank(self._committed)

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write, or commit."""
        return self._state.has_failed or self._error is not None

    def _committed(self) -> Path:
        if self._error is not None:
            raise self._error
        return self.target

    def _commit(self, written: Mapping[str, str]) -> None:
        hashes = {f"{state_path(self._tmp).name}/{name}": digest for name, digest in written.items()}
        arch = read_architecture(self._hf_folder)
        copy_hf_folder(self._hf_folder, hf_path(self._tmp))
        update_positions(
            hf_path(self._tmp) / "config.json",
            mode=self.run_state.position_mode,
            stride=self.run_state.position_stride,
        )
        update_trained(hf_path(self._tmp) / "config.json", self._trained)
        info = CheckpointInfo(
            kind="train",
            step=self.run_state.step,
            family=family_name(arch),
            run_state=self.run_state.to_json(),
            topology=topology_of(self._ranks),
            num_parameters=name_map(arch).num_parameters,
        )
        write_info(self._tmp, info, hashes=hashes)
        commit(self._tmp, self.target)


def _begin(target: Path, num_bytes: int, adapters: AdapterRecord | None) -> Path:
    """The empty folder to write into. A step that a restarted run reaches again replaces its old checkpoint."""
    tmp = begin(target, force=True, needed_bytes=num_bytes)
    state_path(tmp).mkdir()
    if adapters:
        write_record(tmp, adapters, target=target)
    return tmp


def _retain(run_dir: str | Path, step: int, keep: int) -> None:
    write_latest(run_dir, step)
    for path in prune(run_dir, keep=keep, written=step):
        logger.info("deleted %s", path)


def _finish_parameter_gather(model_chunks: Sequence[Any]) -> None:
    """With overlapped gathers the parameters of this step arrive only in the next forward pass; fetch them now."""
    for model_chunk in model_chunks:
        ddp_config = getattr(model_chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            model_chunk.start_param_sync(force_sync=True)
