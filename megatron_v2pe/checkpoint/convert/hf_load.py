"""Weights straight from a Hugging Face folder into a model of any parallel layout, without a stored import.

    this rank's shards (key, offset, shape) --row_runs--> runs of rows of their tensors --memory map--> parameter

A rank touches only the pages of its own rows (and, of row-parallel weights, columns), so that all ranks of a node
together read each byte about once from the disk, and none holds more than its shards.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor

from megatron_v2pe.checkpoint.convert.convert import copy_side_files, open_hf, without_dropped
from megatron_v2pe.checkpoint.files.folder import LAYOUT_FILE, write_layout
from megatron_v2pe.checkpoint.hf.io import HFWeights
from megatron_v2pe.checkpoint.hf.map import Entry, NameMap
from megatron_v2pe.checkpoint.hf.row_runs import rows_of_ours
from megatron_v2pe.checkpoint.state.dist_io import (
    gather_from_ranks,
    load_into_chunks,
    model_sharded_state_dict,
    own_parameter,
    raise_together,
)
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)


def load_hf_weights(hf_folder: str | Path, chunks: Sequence[torch.nn.Module], *, ranks: Ranks) -> int:
    """Fill model chunks from a Hugging Face folder; the counterpart of `load_model_weights`. Collective.

    Args:
        hf_folder: config.json and safetensors.
        chunks: model chunks, before the optimizer is built.
        ranks: this process's place.

    Returns:
        Bytes of weights that this rank read.

    Raises:
        CheckpointError: everything that is wrong with the folder, or it is of another model; on all ranks.
    """
    weights, _, names = open_hf(hf_folder)
    reader = BoxReader(weights, names)
    states, _, factories = load_preprocess(model_sharded_state_dict(chunks, ranks, wanted=own_parameter))
    shards = [shard for shard in nested_values(states) if isinstance(shard, ShardedTensor)]
    problems = [problem for shard in shards for problem in reader.problems(shard)]
    everywhere = sorted({problem for rank in gather_from_ranks(problems) for problem in rank})
    raise_together(f"{hf_folder}: weights of another model", everywhere)
    loaded = dict_list_map_inplace(reader.filled, states)
    load_into_chunks(chunks, apply_factory_merges(loaded, factories), wanted=own_parameter)
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
        self._weights, self._names = weights, names
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
        # The part of this box that exists in the folder; what lies beyond pads vocabulary or vision heads.
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


def copy_hf_folder(source: Path, target: Path) -> None:
    """Make a checkpoint's `hf/`: from another's, or from a Hugging Face folder, whose weights stay behind."""
    if (source / LAYOUT_FILE).is_file():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        return
    weights, _, names = open_hf(source)
    target.mkdir()
    copy_side_files(source, target, weights.side_files())
    write_layout(target, [without_dropped(file, names) for file in weights.files])
