"""Weights straight from a Hugging Face folder into a model of any parallel layout, without a stored import.

    this rank's shards (key, offset, shape) --row_runs--> runs of rows of their tensors --memory map--> parameter

A rank touches only the pages of its own rows (and, of row-parallel weights, columns), so that all ranks of a node
together read each byte about once from the disk, and none has more than its shards in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.hf.name_map import Entry, NameMap
from megatron_v2pe.checkpoint.hf.row_runs import rows_of_ours
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.checkpoint.state.model_state import (
    load_into_model_chunks,
    model_sharded_state_dict,
    without_adapters,
)
from megatron_v2pe.checkpoint.state.private_api import (
    expand_factories,
    map_shards,
    merge_factories,
    shards_in,
)
from megatron_v2pe.checkpoint.state.ranks import gather_from_ranks
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)


def load_hf_weights(hf_folder: str | Path, model_chunks: Sequence[torch.nn.Module], *, ranks: Ranks) -> int:
    """Fill model chunks from a Hugging Face folder; the counterpart of `load_model_weights`. Collective.

    Args:
        hf_folder: config.json and safetensors.
        model_chunks: before the optimizer is built.
        ranks: this process's place.

    Returns:
        Bytes of weights that this rank read.

    Raises:
        CheckpointError: everything that is wrong with the folder, or it is of another model; on all ranks.
    """
    weights, _, names = open_hf(hf_folder)
    reader = BoxReader(weights, names)
    states, factories = expand_factories(
        model_sharded_state_dict(model_chunks, ranks, wanted=without_adapters)
    )
    problems = [problem for shard in shards_in(states) for problem in reader.problems(shard)]
    everywhere = sorted({problem for rank in gather_from_ranks(problems) for problem in rank})
    raise_problems(f"{hf_folder}: weights of another model", everywhere)
    loaded = merge_factories(map_shards(reader.filled, states), factories)
    load_into_model_chunks(model_chunks, loaded, wanted=without_adapters)
    whole = sum(info.num_bytes for info in weights.tensors.values())
    shares = [f"{num_bytes / 2**20:.1f}" for num_bytes in gather_from_ranks(reader.num_bytes)]
    logger.info("%s: read %s of %.1f MiB, by rank", hf_folder, ", ".join(shares), whole / 2**20)
    return reader.num_bytes


class BoxReader:
    """Reads boxes of our parameters from the tensors of a Hugging Face folder.

    Args:
        weights: the folder, without problems.
        names: its table.

    Attributes:
        num_bytes: read so far.
    """

    def __init__(self, weights: HFWeights, names: NameMap) -> None:
        self._weights = weights
        self._names = names
        self.num_bytes = 0

    def problems(self, shard: ShardedTensor) -> Iterator[str]:
        """Why a shard cannot be read, as sentences."""
        entry = self._names.by_ours.get(shard.key)
        if entry is None:
            yield f"{shard.key} is not in the folder"
        elif not shard.allow_shape_mismatch and _shape(entry) != tuple(shard.global_shape):
            yield f"{shard.key} is {_shape(entry)} in the folder, wanted {tuple(shard.global_shape)}"

    def filled(self, shard: Any) -> Any:
        """The data of a shard with its values read into it; rows and columns that only pad become zero."""
        if not isinstance(shard, ShardedTensor):
            return shard
        entry, data = self._names.by_ours[shard.key], shard.data
        # What of this box exists in the folder; the rest pads vocabulary or vision heads.
        starts = shard.global_offset
        ends = [min(a + n, size) for a, n, size in zip(starts, data.shape, _shape(entry), strict=True)]
        inside = tuple(slice(max(0, end - start)) for start, end in zip(starts, ends, strict=True))
        with torch.no_grad():
            if data[inside].numel() < data.numel():
                data.zero_()
            if data[inside].numel():
                self._read(entry, data[inside], starts)
        return data

    def _read(self, entry: Entry, target: Tensor, starts: Sequence[int]) -> None:
        columns = tuple(slice(a, a + n) for a, n in zip(starts[1:], target.shape[1:], strict=True))
        top = -starts[0]  # where the next run begins, counted from the first row of `target`
        for run in rows_of_ours(entry):
            first, last = max(top, 0), min(top + run.num_rows, target.shape[0])
            if first < last:
                rows = slice(run.start + first - top, run.start + last - top)
                values = self._weights.read_box(run.name, (rows, *columns))
                target[first:last].copy_(values)
                self.num_bytes += values.numel() * values.itemsize
            top += run.num_rows


def _shape(entry: Entry) -> tuple[int, ...]:
    """Shape of our parameter, without padding."""
    return (sum(shape[0] for shape in entry.hf_shapes), *entry.hf_shapes[0][1:])
