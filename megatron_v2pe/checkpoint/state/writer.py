"""torch_dist files, written in blocks: no tensor is copied as a whole, none has to be in memory at all.

torch's own writer keeps every tensor that it has written until its file is complete, and copies those that are views
(all parameters of a data parallel run are). This writer reads a tensor when its turn comes, 8 MiB at a time, from where
it is: this process's memory, a GPU, or the file of another format. Each file is hashed while it is written.

Files, names and metadata are those of torch.distributed.checkpoint, which reads them.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_v2pe.checkpoint.files.block_stream import Block, BlockStream, memory_blocks
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.state.private_api import StorageInfo
from megatron_v2pe.checkpoint.state.records import record_frame

ShardKey = tuple[str, tuple[int, ...]]
"""State key, and offset of the shard in the whole tensor."""

Shards = Mapping[ShardKey, Iterable[Block]]
"""The bytes of shards whose tensor is on the meta device."""


class Source(Protocol):
    """Where the data of an item comes from; torch's planners are sources."""

    def resolve_data(self, item: WriteItem) -> Any:
        """A tensor, or an io.BytesIO."""


class StreamingWriter(dcp.FileSystemWriter):
    """torch's writer with its writing replaced; see the module docstring.

    Args:
        folder: where the files go.
        unread: shards that are read when they are written.
        file_of: file of a shard; the others go to the rank's own. When it is given, the metadata does not depend on
            the number of ranks.

    Attributes:
        hashes: name of each file that this rank wrote -> SHA-256.
        is_snapshot: tensors are in host memory and do not change any more, so that they are written without a copy;
            otherwise through a buffer.
        cancelled: writing ends with an error soon after it is set.
    """

    def __init__(
        self, folder: Path, *, unread: Shards | None = None, file_of: Mapping[ShardKey, str] | None = None
    ) -> None:
        super().__init__(folder)
        self.hashes: dict[str, str] = {}
        self.is_snapshot = False
        self.cancelled: threading.Event | None = None
        self._unread = unread or {}
        self._file_of = file_of or {}

    def write_data(self, plan: SavePlan, planner: Source) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's items; `planner` provides their data."""
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            name = self._file_of.get(item_key(item), f"{plan.storage_data.prefix}0.distcp")
            by_file.setdefault(name, []).append(item)
        results: list[WriteResult] = []
        digests: dict[str, Future[str]] = {}
        with BlockStream() as stream:
            for name, items in by_file.items():
                stream.open(Path(self.path) / name, is_hashed=True)
                results += [self._write(stream, name, item, planner) for item in items]
                digests[name] = stream.close()
        self.hashes = {name: digest.result() for name, digest in digests.items()}
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`."""
        if self._file_of:
            metadata, results = _ordered(metadata, results)
        super().finish(metadata, results)

    def storage_meta(self) -> Any:
        """Nothing: torch would store the temporary name of the folder and a random number, and reads neither."""
        return None

    def _write(self, stream: BlockStream, name: str, item: WriteItem, planner: Source) -> WriteResult:
        if self.cancelled is not None and self.cancelled.is_set():
            raise InterruptedError("the save was cancelled")
        start = stream.position
        if item.type == WriteItemType.BYTE_IO:
            stream.put(cast(io.BytesIO, planner.resolve_data(item)).getbuffer())
        else:
            blocks = self._unread.get(item_key(item))
            if blocks is None:
                blocks = memory_blocks(planner.resolve_data(item), is_snapshot=self.is_snapshot)
            frame = record_frame(_info(item))
            stream.put(frame.head)
            stream.put_blocks(blocks)
            stream.put(frame.tail)
        length = stream.position - start
        return WriteResult(
            index=item.index, size_in_bytes=length, storage_data=StorageInfo(name, start, length)
        )


def item_key(item: WriteItem) -> ShardKey:
    """Which shard an item of a plan is."""
    return item.index.fqn, tuple(item.index.offset or ())


def _info(item: WriteItem) -> TensorInfo:
    assert item.tensor_data is not None
    return TensorInfo(item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))


def _ordered(
    metadata: Metadata, results: list[list[WriteResult]]
) -> tuple[Metadata, list[list[WriteResult]]]:
    """The same, rebuilt in the order of keys and offsets.

    Every object is made here, because pickle writes shared objects differently from equal ones: what came from several
    ranks would give other bytes than what one rank made.
    """
    where = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rank in results for r in rank}
    files = {info.relative_path: info.relative_path for info in where.values()}
    tensors: dict[str, Any] = {}
    ordered: list[WriteResult] = []
    for key in sorted(metadata.state_dict_metadata):
        stored = metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata), "only tensors are planned into files"
        boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks)
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=stored.properties.dtype),
            size=torch.Size(tuple(stored.size)),
            chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes],
        )
        for i, (offsets, _) in enumerate(boxes):
            info = where[key, offsets]
            location = StorageInfo(files[info.relative_path], info.offset, info.length)
            ordered.append(WriteResult(MetadataIndex(key, offsets, i), info.length, location))
    return Metadata(state_dict_metadata=tensors), [ordered]
