"""From one Hugging Face format into the other, tensor by tensor: `convert-hf`, and `export-hf --format`.

    source folder --its names table--> rows of our parameters, read when asked for --other names table--> files

Nothing of ours is stored in between: each block of a tensor is read through both tables. No value is computed, so every
tensor keeps its bits; rows of fused queries, keys and values move.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.convert.export_hf import SHARD_BYTES, write_folder
from megatron_v2pe.checkpoint.convert.exported_tensors import ConvertedTensors
from megatron_v2pe.checkpoint.convert.hf_source import open_hf, without_dropped
from megatron_v2pe.checkpoint.convert.side_files import files_of_other_format
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.hf.converted_blocks import Dtype, Progress, silent
from megatron_v2pe.checkpoint.hf.name_map import NameMap, other_names
from megatron_v2pe.checkpoint.hf.row_runs import RowRun, rows_of_ours
from megatron_v2pe.checkpoint.hf.weight_files import plan_weight_files
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.native import FolderFormat
from megatron_v2pe.core.errors import CheckpointError

logger = logging.getLogger(__name__)


class OursInHF:
    """Our parameters as rows of a Hugging Face folder; nothing is stored.

    Args:
        weights: the folder.
        names: its table.
    """

    def __init__(self, weights: HFWeights, names: NameMap) -> None:
        self._weights, self._names = weights, names
        self._runs = lru_cache(maxsize=64)(self._runs_of)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each of our parameters."""
        return {
            name: TensorInfo(
                self._weights.tensors[entry.hf[0]].dtype,
                (sum(shape[0] for shape in entry.hf_shapes), *entry.hf_shapes[0][1:]),
            )
            for name, entry in self._names.by_ours.items()
        }

    def _runs_of(self, name: str) -> list[RowRun]:
        return rows_of_ours(self._names.by_ours[name])

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of one of our parameters into `out`."""
        top = 0
        for run in self._runs(name):
            first, last = max(start, top), min(stop, top + run.num_rows)
            if first < last:
                offset = run.start - top
                self._weights.read_rows(
                    run.name, first + offset, last + offset, out[first - start : last - start]
                )
            top += run.num_rows


def convert_hf(
    source: str | Path,
    target: str | Path,
    *,
    to: FolderFormat | None = None,
    force: bool = False,
    dtype: Dtype = "keep",
    max_shard_bytes: int = 0,
    progress: Progress = silent,
    expect: Progress = silent,
) -> FolderFormat:
    """Write a Hugging Face folder in the other format. Collective where there are several ranks.

    Args:
        source: a GitHub or a native folder.
        target: folder to create.
        to: format that is wanted; None is the one that the source does not have.
        force: replace `target` if it exists, once the new one is complete.
        dtype: cast floating point tensors.
        max_shard_bytes: largest weight file; 0 is `SHARD_BYTES`.
        progress: called with the bytes of each block.
        expect: called once, before, with all bytes of this rank.

    Returns:
        The format of the target.

    Raises:
        CheckpointError: everything that is wrong with the source; it has the wanted format already; the other format
            cannot hold the model; or the target cannot be written.
    """
    weights, arch, names = open_hf(source)
    if to == arch.folder_format:
        raise CheckpointError(f"{source}: has the format {to} already; copy the folder")
    written, side_files = files_of_other_format(Path(source))
    for file in weights.files:
        without_dropped(file, names)  # names what is left out
    tensors = ConvertedTensors(OursInHF(weights, names), other_names(arch), dtype=dtype, progress=progress)
    files = plan_weight_files(tensors.infos(), max_shard_bytes=max_shard_bytes or SHARD_BYTES)
    _warn_of_lost_norms(weights, names)
    write_folder(target, tensors, files, side_files, force=force, dtype=dtype, expect=expect)
    return written


def _warn_of_lost_norms(weights: HFWeights, names: NameMap) -> None:
    """The release's converter loses the tower's q/k norms, which then are all one."""
    lost = [
        hf
        for ours, entry in names.by_ours.items()
        if ours.startswith("vision.") and ours.endswith(("q_norm.weight", "k_norm.weight"))
        for hf in entry.hf
    ]
    if lost and all(bool((weights.read(name) == torch.ones(())).all()) for name in lost):
        logger.warning(
            "every q_norm and k_norm of the vision tower (%d tensors) is exactly 1, as in folders that the release's "
            "converter made; compare with the GitHub folder of the model",
            len(lost),
        )
