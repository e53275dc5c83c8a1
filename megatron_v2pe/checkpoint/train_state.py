"""Everything a run needs to go on, in one checkpoint folder.

    save   parameters in sync -> each rank's own range of model and optimizer, generators -> files of each rank
           -> hf/ with the positions that were trained -> checkpoint.json, with the hashes that the ranks made while
           writing -> rename -> latest
    load   a folder that `resume_point` chose -> the same, at any tp, pp, cp, dp

Tensors and optimizer state are stored in the shape of the whole model and load under any layout. Random generators are
a property of the layout: they are restored at the same one, and seeded by the step at another (with a warning).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_v2pe.checkpoint.convert.hf_load import copy_hf_folder
from megatron_v2pe.checkpoint.files.adapter_record import AdapterRecord, read_record, write_record
from megatron_v2pe.checkpoint.files.folder import (
    CheckpointInfo,
    begin,
    commit,
    hf_path,
    read_info,
    state_path,
    write_info,
)
from megatron_v2pe.checkpoint.hf.config_json import update_positions
from megatron_v2pe.checkpoint.hf.map import family_name, name_map
from megatron_v2pe.checkpoint.retention import prune, step_path, write_latest
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.dist_io import (
    every_parameter,
    load_into_chunks,
    load_state,
    model_sharded_state_dict,
    on_first_rank,
    sharded_state_metadata,
    stored_bytes,
)
from megatron_v2pe.checkpoint.state.host_memory import HostCopy
from megatron_v2pe.checkpoint.state.optimizer_groups import with_own_groups
from megatron_v2pe.checkpoint.state.own_ranges import owned_states
from megatron_v2pe.checkpoint.state.save import KnownPlan, StateSave
from megatron_v2pe.config.architecture import read_architecture
from megatron_v2pe.parallel.topology import Ranks, seed_generators

logger = logging.getLogger(__name__)
_SEEDS_PER_STEP = 1_000_003  # beyond what stages and tensor parallel ranks add to a seed


def save_checkpoint(run_dir: str | Path, **what: Any) -> Path:
    """Write the checkpoint of a step while the caller waits. Collective; arguments as of `CheckpointSave`.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: it cannot be written; the previous checkpoint is untouched. Raised on all ranks.
    """
    save = CheckpointSave(run_dir, **what)
    save.write()
    save.join()
    save.commit()
    return save.finish()


class CheckpointSave:
    """The checkpoint of one step on its way to the disk; made while all ranks stand behind that step. Collective.

        write    each rank, any thread     its tensors           `copy_state` before it if training goes on: what is
        join     all ranks                                       stored is then the state of the time of that call
        commit   each rank, any thread     rank 0 alone: .metadata, hf/, checkpoint.json, rename, latest, old ones
        finish   all ranks                                       the folder, or an error on all of them

    Args:
        run_dir: folder of the run, seen by all ranks.
        chunks: model chunks, wrapped in DDP or not.
        optimizer: mcore's optimizer over them.
        run_state: the rest; its step names the folder.
        ranks: this process's place.
        hf_folder: `hf/` of the checkpoint the run started from, or the Hugging Face folder itself.
        keep: newest checkpoints that stay.
        adapters: of a run that trains adapters: what is stored, and which base it belongs to.
        known: `known` of an earlier save of this run.

    Raises:
        CheckpointError: no room, or the folder cannot be made. Raised on all ranks.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        chunks: Sequence[Any],
        optimizer: Any,
        run_state: RunState,
        ranks: Ranks,
        hf_folder: str | Path,
        keep: int,
        adapters: AdapterRecord | None = None,
        known: KnownPlan | None = None,
    ) -> None:
        self.run_dir, self.run_state, self.keep = run_dir, run_state, keep
        self._hf_folder, self._ranks = Path(hf_folder), ranks
        _finish_parameter_gather(chunks)
        wanted = adapters.holds if adapters else every_parameter
        states = owned_states(model_sharded_state_dict(chunks, ranks, wanted=wanted), optimizer)
        states["generators"] = _generator_shard(ranks)
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
        """Copy this rank's tensors; `memory` must be left alone until `write` is done."""
        self._state.copy_tensors(memory)

    def write(self, *, cancelled: threading.Event | None = None) -> None:
        """Write this rank's files. Not collective; what goes wrong is raised by `join`.

        Args:
            cancelled: when it is set, writing ends soon, and `join` raises.
        """
        self._state.write(cancelled=cancelled)

    def join(self) -> None:
        """Tell rank 0 what was written. Collective; every rank has returned from `write`.

        Raises:
            CheckpointError: a rank could not write; the previous checkpoint is untouched. Raised on all ranks.
        """
        self._state.join()

    def commit(self) -> None:
        """Make a checkpoint of what all ranks wrote, point `latest` at it, delete old ones: rank 0 does.

        Not collective; what goes wrong is raised by `finish`.
        """
        if self._ranks.rank != 0:
            return
        try:
            self._commit(self._state.complete())
            _retain(self.run_dir, self.run_state.step, self.keep)
        except Exception as error:  # told to all ranks by `finish`
            self._error = error

    def finish(self) -> Path:
        """The finished folder. Collective; every rank has returned from `commit`.

        Raises:
            CheckpointError: the folder could not be completed. Raised on all ranks.
        """
        return on_first_rank(self._committed)

    @property
    def has_failed(self) -> bool:
        """This rank could not write, or commit."""
        return self._state.has_failed or self._error is not None

    def _committed(self) -> Path:
        if self._error is not None:
            raise self._error
        return self.target

    def _commit(self, written: Mapping[str, str]) -> None:
        hashes = {f"{state_path(self._tmp).name}/{name}": digest for name, digest in written.items()}
        arch = read_architecture(self._hf_folder)
        copy_hf_folder(self._hf_folder, hf_path(self._tmp))
        update_positions(hf_path(self._tmp) / "config.json", self.run_state)
        info = CheckpointInfo(
            kind="train",
            step=self.run_state.step,
            family=family_name(arch),
            run_state=self.run_state.to_json(),
            topology=_topology(self._ranks),
            num_parameters=name_map(arch).num_parameters,
        )
        write_info(self._tmp, info, hashes=hashes)
        commit(self._tmp, self.target)


def load_checkpoint(folder: str | Path, *, chunks: Sequence[Any], optimizer: Any, ranks: Ranks) -> RunState:
    """Restore model, optimizer and generators from a training checkpoint. Collective.

    Of a checkpoint of adapters, what it holds; the base's weights must be in the model already.

    Args:
        folder: a step folder, of any parallel layout.
        chunks: model chunks as they were given to the optimizer.
        optimizer: mcore's optimizer, freshly built.
        ranks: this process's place.

    Raises:
        CheckpointError: not a complete training checkpoint, or one of another model.
    """
    info = read_info(folder)
    run_state = RunState.from_json(info.run_state)
    record = read_record(folder)
    wanted = record.holds if record else every_parameter
    states = model_sharded_state_dict(chunks, ranks, wanted=wanted)
    metadata = sharded_state_metadata(ranks)
    states["optimizer"] = optimizer.sharded_state_dict(dict(states), is_loading=True, metadata=metadata)
    has_same_layout = info.topology == _topology(ranks)
    if has_same_layout:
        states["generators"] = _generator_shard(ranks)
    else:
        logger.warning(
            "%s was written by another parallel layout (%s): random generators are seeded anew for step %d",
            folder,
            info.topology,
            run_state.step,
        )
    loaded = load_state(state_path(folder), states)
    load_into_chunks(chunks, loaded, wanted=wanted)
    optimizer.load_state_dict(with_own_groups(loaded["optimizer"], optimizer))
    if has_same_layout:
        _set_generators(loaded["generators"])
    else:  # not as at step 0, or the draws of the first steps would come again
        seed_generators(run_state.data_seed + _SEEDS_PER_STEP * run_state.step)
    return run_state


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


def _finish_parameter_gather(chunks: Sequence[Any]) -> None:
    """With overlapped gathers the parameters of this step arrive only in the next forward pass; fetch them now."""
    for chunk in chunks:
        ddp_config = getattr(chunk, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _topology(ranks: Ranks) -> dict[str, int]:
    groups = ranks.groups
    sizes = {"tp": groups.tp.size(), "pp": groups.pp.size(), "cp": groups.cp.size(), "dp": groups.dp.size()}
    return {"world_size": ranks.world_size, **sizes}


def _generator_shard(ranks: Ranks) -> ShardedObject:
    """States of this rank's random generators, as one shard of an object with a shard per rank."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mcore": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("generators", state, (ranks.world_size,), (ranks.rank,), replica_id=0)


def _set_generators(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["mcore"])
