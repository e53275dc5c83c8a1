"""safetensors files by their headers: names, dtypes, shapes, and where the bytes of each tensor are.

Headers are parsed here, because they give order, sizes and truncation without touching data. Key order and metadata
are kept, so that a file written from the same description is the same file, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import foreign_content, not_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names."""
_UNREAD_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "U16", "U32", "U64")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS, _MOST_ROWS = 16, 2**60


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, as a header has them."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Size of the first dimension; a tensor without dimensions counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


@dataclass
class WeightFile:
    """One safetensors file: its tensors in the order of the data, and its metadata."""

    name: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def header(self) -> bytes:
        """The bytes of the file before its data."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        for name, start in self.offsets().items():
            info = self.tensors[name]
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, start + info.num_bytes],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        return struct.pack("<Q", len(text)) + text

    def offsets(self) -> dict[str, int]:
        """Where each tensor's bytes begin, from the start of the data."""
        ends = accumulate(info.num_bytes for info in self.tensors.values())
        return {
            name: end - info.num_bytes for (name, info), end in zip(self.tensors.items(), ends, strict=True)
        }


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape as a json file has it.

    Raises:
        ValueError: not a list of a few sizes.
    """
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        raise ValueError(f"{str(value)[:60]} is no shape")
    if (
        not all(type(size) is int and 0 <= size < _MOST_ROWS for size in value)
        or math.prod(value) >= _MOST_ROWS
    ):
        raise ValueError(f"{str(value)[:60]} is no shape")
    return tuple(value)


def _entry(value: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """Dtype and shape of a header's entry, and where its data begins and ends."""
    start, end = value["data_offsets"]
    if not (type(start) is int and type(end) is int and 0 <= start <= end < _MOST_ROWS):
        raise ValueError(f"data_offsets {str(value['data_offsets'])[:60]}")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {str(value['dtype'])[:60]!r}; known are {', '.join(DTYPES)}")
    return TensorInfo(DTYPES[value["dtype"]], shape_of(value["shape"])), (start, end)


def read_header(path: Path) -> tuple[WeightFile, int]:
    """List the tensors of a safetensors file and check that its data is all there.

    Returns:
        The tensors in the order of their data; where the data begins.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than the header requires.
    """
    size = _size_of(path)
    with path.open("rb") as stream:
        prefix = stream.read(512)
        foreign = foreign_content(prefix)
        if foreign:
            raise CheckpointError(f"{path}: {foreign}")
        prefix = prefix[:8]
        stream.seek(len(prefix))
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if header_bytes > min(size, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a safetensors file, or cut within its header ({size} bytes)")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
        metadata = _texts(header.pop("__metadata__", {}))
        unread = {value["dtype"] for value in header.values()} & set(_UNREAD_DTYPES)
        if unread:
            raise CheckpointError(
                f"{path}: holds tensors of {', '.join(sorted(unread))}, which are not read here (quantised weights?); "
                "give a folder in bfloat16, float16 or float32"
            )
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors header ({type(error).__name__}: {str(error)[:300]})"
        ) from None
    tensors = {name: info for name, (info, _) in entries.items()}
    ends = {name: place for name, (_, place) in entries.items()}
    wrong = [name for name, (start, end) in ends.items() if end - start != tensors[name].num_bytes]
    if wrong:
        raise CheckpointError(f"{path}: damaged safetensors header, {wrong[0]!r} has a size unlike its shape")
    expected = 8 + header_bytes + max((end for _, end in ends.values()), default=0)
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{path}: {state}, {size} bytes where its header requires {expected}; copy it again"
        )
    in_order = sorted(tensors, key=lambda name: ends[name])
    file = WeightFile(path.name, {name: tensors[name] for name in in_order}, metadata)
    moved = [name for name, start in file.offsets().items() if start != ends[name][0]]
    if moved:
        raise CheckpointError(
            f"{path}: damaged safetensors header, {moved[0]!r} does not begin where the tensor before it ends"
        )
    return file, 8 + header_bytes


def _size_of(path: Path) -> int:
    """Bytes of a regular file."""
    foreign = not_regular(path)
    if foreign:
        raise CheckpointError(f"{path}: {foreign}")
    return path.stat().st_size


def _texts(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise TypeError("__metadata__ must be an object of texts")
    return values


def write_weight_file(folder: Path, *, file: WeightFile, read: Callable[[str], Tensor]) -> None:
    """Write a small safetensors file tensor by tensor; large ones go through `BlockStream`.

    Args:
        folder: where `file.name` is created.
        file: tensors in the order in which they are written.
        read: gives the tensor of a name; its dtype and shape must be those in `file`.
    """
    with (folder / file.name).open("wb") as stream:
        stream.write(file.header())
        for name, info in file.tensors.items():
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise CheckpointError(f"{name}: is {found}, planned as {info.dtype} {info.shape}")
            stream.write(tensor_bytes(tensor))
        stream.flush()
        os.fsync(stream.fileno())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row by row; a copy only where it is not contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
