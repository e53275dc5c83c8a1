"""The files, shards and rows of an import, planned before anything is read.

The plan depends on the Hugging Face folder alone. Files are assigned to ranks whole, so any number of ranks writes the
same bytes. Tensors that are stacked in ours (gate above up) are shards of their own, so that a rank which needs one of
them does not read both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_v2pe.checkpoint.files.block_stream import Block
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.hf.converted_blocks import Dtype, Progress, converted_blocks, converted_info
from megatron_v2pe.checkpoint.hf.name_map import Entry
from megatron_v2pe.checkpoint.hf.row_runs import RowRun, rows_of_ours
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.checkpoint.state.records import record_frame
from megatron_v2pe.checkpoint.state.writer import ShardKey

STATE_FILE_BYTES = 512 * 2**20
"""A state file is closed before it grows beyond this; a larger shard has a file to itself."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard of one of our parameters.

    Attributes:
        key: state key.
        index: which of the `num_shards` equal shards along dimension 0 it is.
        num_shards: shards of the parameter.
        info: dtype and shape of the shard.
        runs: its rows in the Hugging Face tensors.
        num_bytes: of its record in the file.
    """

    key: str
    index: int
    num_shards: int
    info: TensorInfo
    runs: tuple[RowRun, ...]
    num_bytes: int

    def sharded_tensor(self) -> ShardedTensor:
        """mcore's description, without data."""
        meta = torch.empty(self.info.shape, dtype=self.info.dtype, device="meta")
        return ShardedTensor.from_rank_offsets(self.key, meta, (0, self.index, self.num_shards))

    @property
    def where(self) -> ShardKey:
        """Key and offset."""
        first_row = self.index * self.info.num_rows
        return self.key, (first_row, *(0 for _ in self.info.shape[1:]))


@dataclass(frozen=True)
class ImportPlan:
    """All shards, in files.

    Attributes:
        files: name -> its shards, in order.
    """

    files: dict[str, list[PlannedShard]]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(shard.num_bytes for shards in self.files.values() for shard in shards)

    @property
    def file_of(self) -> dict[ShardKey, str]:
        """File of each shard."""
        return {shard.where: name for name, shards in self.files.items() for shard in shards}

    def share(self, rank: int, world_size: int) -> list[PlannedShard]:
        """Shards of the files that a rank writes."""
        names = list(self.files)[rank::world_size]
        return [shard for name in names for shard in self.files[name]]


def plan_import(entries: Iterable[Entry], tensors: dict[str, TensorInfo], *, dtype: Dtype) -> ImportPlan:
    """Lay out the parameters of a Hugging Face folder.

    Args:
        entries: the names table, one entry for each parameter.
        tensors: what the folder holds.
        dtype: cast of floating point tensors.
    """
    files: list[list[PlannedShard]] = [[]]
    room = STATE_FILE_BYTES
    for shard in (shard for entry in entries for shard in _shards(entry, tensors, dtype)):
        if shard.num_bytes > room and files[-1]:
            files.append([])
            room = STATE_FILE_BYTES
        files[-1].append(shard)
        room -= shard.num_bytes
    # Named as if one process had written them all; torch finds files by the metadata, not by their names.
    return ImportPlan({f"__0_{i}.distcp": shards for i, shards in enumerate(files)})


def _shards(entry: Entry, tensors: dict[str, TensorInfo], dtype: Dtype) -> Iterable[PlannedShard]:
    runs = rows_of_ours(entry)
    groups: Sequence[Sequence[RowRun]] = [[run] for run in runs] if entry.transform.is_stacked else [runs]
    columns = entry.hf_shapes[0][1:]
    stored = tensors[entry.hf[0]].dtype
    for i, group in enumerate(groups):
        shape = (sum(run.num_rows for run in group), *columns)
        info = converted_info(TensorInfo(stored, shape), dtype)
        num_bytes = info.num_bytes + record_frame(info).num_bytes
        yield PlannedShard(entry.ours, i, len(groups), info, tuple(group), num_bytes)


def unread_shards(
    shards: Sequence[PlannedShard], weights: HFWeights, *, not_finite: Counter[str], progress: Progress
) -> tuple[dict[str, Any], dict[ShardKey, Iterable[Block]]]:
    """mcore's description of shards, and their bytes, which are read when they are written."""
    described = {f"{shard.key}/{shard.index}": shard.sharded_tensor() for shard in shards}
    blocks: dict[ShardKey, Iterable[Block]] = {
        shard.where: converted_blocks(
            weights, shard.runs, target=shard.info, not_finite=not_finite, progress=progress
        )
        for shard in shards
    }
    return described, blocks
