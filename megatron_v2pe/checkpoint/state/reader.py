"""Tensors of a state folder, by rows, in one process and without a model.

Only the requested bytes of each shard are read. torch's own reader loads whole shards, and copies them.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_v2pe.checkpoint.files.range_reader import RangeReader
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.state.metadata_file import read_metadata
from megatron_v2pe.checkpoint.state.records import data_offset, load_record
from megatron_v2pe.core.errors import CheckpointError


@dataclass(frozen=True)
class _Shard:
    """A stored box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class StateReader:
    """Tensors of a state folder; only files that are needed are opened.

    Args:
        folder: a state folder.

    Attributes:
        tensors: state key -> dtype and shape as stored.
        metadata: what `.metadata` says, checked.

    Raises:
        CheckpointError: the folder's metadata is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = metadata = read_metadata(folder)
        try:
            self._shards = _shards(metadata)
        except KeyError as error:
            raise CheckpointError(f"{folder}: .metadata has no place for {error}") from None
        self.tensors = {
            key: TensorInfo(value.properties.dtype, tuple(value.size))
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._ranges = RangeReader(folder)
        self._data_offsets: dict[tuple[str, int], int | None] = {}

    def read(self, key: str) -> Tensor:
        """One whole tensor.

        Raises:
            CheckpointError: its files are damaged.
        """
        info = self.tensors[key]
        whole = torch.empty(info.shape, dtype=info.dtype)
        self.read_rows(key, 0, info.num_rows, whole)
        return whole

    def read_rows(self, key: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of a tensor; one without dimensions counts as one row.

        Args:
            key: state key.
            start: first row.
            stop: row after the last.
            out: receives them; contiguous, of the stored dtype, [stop - start, ...].

        Raises:
            CheckpointError: files are damaged, or rows are stored nowhere.
        """
        info = self.tensors[key]
        rows = out.reshape(stop - start, *info.shape[1:])
        try:
            filled = sum(self._read_shard(shard, info, start, rows) for shard in self._shards[key])
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{self.folder}: {key} cannot be read ({type(error).__name__}: {error})"
            ) from error
        if filled != rows.numel():
            raise CheckpointError(
                f"{self.folder}: {key} cannot be read: {rows.numel() - filled} of its values are not stored"
            )

    def _read_shard(self, shard: _Shard, info: TensorInfo, start: int, rows: Tensor) -> int:
        """Copy what a shard has of `rows`; returns the number of values."""
        offset, size = (shard.offsets or (0,))[0], (shard.sizes or (1,))[0]
        first, last = max(start, offset), min(start + rows.shape[0], offset + size)
        if first >= last:
            return 0
        box = (
            slice(first - start, last - start),
            *(slice(a, a + n) for a, n in zip(shard.offsets[1:], shard.sizes[1:], strict=True)),
        )
        target = rows[box]
        if target.is_contiguous():
            self._read_box(shard, info, first - offset, target)
        else:
            contiguous = torch.empty(target.shape, dtype=target.dtype)
            self._read_box(shard, info, first - offset, contiguous)
            target.copy_(contiguous)
        return target.numel()

    def _read_box(self, shard: _Shard, info: TensorInfo, first_row: int, out: Tensor) -> None:
        """Rows of one shard from `first_row` on."""
        at = (shard.file, shard.start)
        record: dict[str, Any] = {
            "path": self.folder / shard.file,
            "start": shard.start,
            "length": shard.length,
        }
        if at not in self._data_offsets:
            self._data_offsets[at] = data_offset(**record, info=TensorInfo(info.dtype, shard.sizes))
        data = self._data_offsets[at]
        if data is None:
            whole = load_record(**record).reshape(-1, *shard.sizes[1:])
            out.copy_(whole[first_row : first_row + out.shape[0]])
        else:
            row_bytes = prod(shard.sizes[1:]) * info.dtype.itemsize
            self._ranges.read_into(out, file=shard.file, offset=data + first_row * row_bytes)


def _shards(metadata: Metadata) -> dict[str, list[_Shard]]:
    found = {}
    for key, value in metadata.state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            found[key] = [_shard(metadata, key, stored) for stored in value.chunks]
    return found


def _shard(metadata: Metadata, key: str, stored: ChunkStorageMetadata) -> _Shard:
    where = metadata.storage_data[MetadataIndex(key, stored.offsets)]
    return _Shard(tuple(stored.offsets), tuple(stored.sizes), where.relative_path, where.offset, where.length)
