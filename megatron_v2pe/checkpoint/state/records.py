"""One tensor in a torch_dist file: what surrounds its bytes, and where in the file its bytes are.

    .distcp file   record record record ...
    record         head | bytes of the tensor, row by row | tail         a zip archive, as torch.save writes it

Head and tail depend on dtype and shape only (the checksum of the zip archive, which torch.load does not check, is
left out; `checkpoint.json` has hashes of whole files). So torch.save makes them without the tensor's bytes, which
can come from anywhere and in blocks.
"""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.state.private_api import offset_in_archive

_DATA = "data/0"  # the only storage of the archive


@dataclass(frozen=True)
class Frame:
    """What surrounds the bytes of a tensor.

    Attributes:
        head: before them.
        tail: after them.
    """

    head: bytes
    tail: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes that a record has beyond its tensor's."""
        return len(self.head) + len(self.tail)


@functools.lru_cache(maxsize=256)
def record_frame(info: TensorInfo) -> Frame:
    """Head and tail of the record of a contiguous tensor."""
    stream = _HoleStream()
    # Never touched, so the system gives no memory for it, however large it is.
    tensor = torch.empty(info.shape, dtype=info.dtype)
    with torch.serialization.skip_data():
        torch.save(tensor, cast(Any, stream))
    hole, size = stream.hole
    if size != info.num_bytes:
        raise RuntimeError(f"torch.save left room for {size} bytes of {info}")
    written = b"".join(stream.written)
    return Frame(written[:hole], written[hole:])


class _HoleStream:
    """A file for torch.save that notes where it left room for data, instead of having it.

    Attributes:
        written: what was written, the hole left out.
        hole: where it begins, and its size.
    """

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.hole = (0, 0)

    def write(self, data: bytes) -> int:
        """Append."""
        self.written.append(bytes(data))
        return len(self.written[-1])

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Leave out `offset` bytes; the only move that torch.save makes."""
        if whence != os.SEEK_CUR or self.hole[1]:
            raise io.UnsupportedOperation("only one hole, relative to the current position")
        self.hole = (sum(map(len, self.written)), offset)
        return sum(self.hole)

    def flush(self) -> None:
        """Nothing to do."""


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, path: Path, start: int, length: int) -> None:
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._length - self._at)]
        got = os.preadv(self._file.fileno(), [room], self._start + self._at) if room else 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


def load_record(path: Path, *, start: int, length: int) -> Tensor:
    """The tensor of a record, as torch.load reads it; errors as `data_offset` has them."""
    with io.BufferedReader(_Window(path, start, length)) as window:
        return torch.load(window, weights_only=True)


def data_offset(path: Path, *, start: int, length: int, info: TensorInfo) -> int | None:
    """Where the bytes of a record's tensor begin, from the start of the file.

    Args:
        path: a torch_dist file.
        start: first byte of the record.
        length: bytes of the record.
        info: what the record must contain.

    Returns:
        The offset; None for a tensor whose bytes are not row by row, which only torch.load can read.

    Raises:
        RuntimeError, pickle.UnpicklingError, OSError: not a record, or the record of another tensor.
    """
    frame = record_frame(info)
    with io.BufferedReader(_Window(path, start, length)) as window:
        if length == frame.num_bytes + info.num_bytes and window.read(len(frame.head)) == frame.head:
            return start + len(frame.head)  # as this program writes it
        window.seek(0)
        with torch.serialization.skip_data():
            tensor = torch.load(window, weights_only=True)
        found = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if found != info:
            raise RuntimeError(f"holds {found} where {info} is expected")
        if not tensor.is_contiguous():
            return None
        window.seek(0)
        inside = offset_in_archive(window, _DATA)
    return start + inside + tensor.storage_offset() * tensor.itemsize
