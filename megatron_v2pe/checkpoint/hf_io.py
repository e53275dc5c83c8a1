"""Hugging Face weight folders: list what is there, read one tensor at a time, write shards.

    folder/  model.safetensors                                   one file
             model-0000k-of-0000n.safetensors + index.json       or shards, the index says which tensor is where
             everything else                                     configuration, tokenizer, code: side files

Headers are parsed here, because they give order, sizes and truncation without touching data; tensor data is read
through safetensors' memory map and written as raw bytes, so memory holds one tensor, never a file. Key order and
metadata of a header are kept, so that a folder written from the same layout is the same file, byte for byte.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_v2pe.core.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
"""Files that hold weights in some form; none of them is a side file."""
SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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


class HFWeights:
    """The weights of a Hugging Face folder. Opening it reads headers only.

    Args:
        folder: the folder.

    Attributes:
        files: weight files in the order of their names.
        tensors: all tensors, file by file in data order.
        problems: everything that is wrong with the folder, one sentence each; reading is only sound when empty.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: list[WeightFile] = []
        self.problems: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        if not self.folder.is_dir():
            self.problems.append(f"{self.folder}: no such folder")
            return
        for name in self._find_files():
            self._open(name)
        self._check_index()

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped from its file."""
        return self._handle(name).get_tensor(name)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of one tensor, one slice for each dimension; nothing else of the file is touched."""
        return self._handle(name).get_slice(name)[box]

    def _handle(self, name: str) -> Any:
        """The open memory map of the file that holds a tensor."""
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = safe_open(self.folder / file, framework="pt")
        return self._handles[file]

    def side_files(self) -> list[Path]:
        """Paths, relative to the folder, of everything that is not weights, sorted."""
        found = []
        for root, folders, names in os.walk(self.folder):
            folders[:] = sorted(set(folders) - set(SKIPPED_FOLDERS))
            found += [(Path(root) / name).relative_to(self.folder) for name in names]
        return sorted(path for path in found if path.suffix not in WEIGHT_SUFFIXES)

    def _find_files(self) -> list[str]:
        index = self._read_index()
        if index:
            return sorted(set(index.values()))
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if SINGLE_FILE in found or len(found) == 1:
            return [SINGLE_FILE] if SINGLE_FILE in found else found
        if found:
            self.problems.append(f"{self.folder}: {len(found)} safetensors files but no {INDEX_FILE}")
        elif list(self.folder.glob("*.bin")) + list(self.folder.glob("*.pt*")):
            self.problems.append(
                f"{self.folder}: the weights are pickle files, which can run code when they are opened; "
                f"save them as safetensors first (save_pretrained(..., safe_serialization=True))"
            )
        else:
            self.problems.append(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE}")
        return []

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            self.problems.append(f"{path}: not a safetensors index ({type(error).__name__}: {error})")
            return {}
        outside = sorted({file for file in index.values() if Path(file).name != file})
        if outside:
            self.problems.append(f"{path}: names files outside the folder: {', '.join(outside)}")
        return {name: file for name, file in index.items() if file not in outside}

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self.problems.append(f"{path}: missing; {INDEX_FILE} names this file")
            return
        try:
            file = read_header(path)
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        self.files.append(file)
        self.tensors.update(file.tensors)
        self._file_of.update(dict.fromkeys(file.tensors, name))

    def _check_index(self) -> None:
        opened = {file.name for file in self.files}
        index = self._read_index() if (self.folder / INDEX_FILE).is_file() else {}
        for name, file in index.items():
            if file in opened and self._file_of.get(name) != file:
                self.problems.append(
                    f"{self.folder / INDEX_FILE}: names {name!r} in {file}, but it is not there"
                )
        if index:
            for name in sorted(set(self._file_of) - set(index)):
                self.problems.append(
                    f"{self.folder / self._file_of[name]}: holds {name!r}, which {INDEX_FILE} omits"
                )


def read_header(path: Path) -> WeightFile:
    """List the tensors of a safetensors file and check that its data is all there.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if header_bytes > min(size, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a safetensors file, or cut within its header ({size} bytes)")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        ends = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
        tensors = {
            name: TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged safetensors header ({type(error).__name__}: {error})"
        ) from None
    wrong = [name for name, (start, end) in ends.items() if end - start != tensors[name].num_bytes]
    if wrong:
        raise CheckpointError(f"{path}: damaged safetensors header, {wrong[0]!r} has a size unlike its shape")
    expected = 8 + header_bytes + max((end for _, end in ends.values()), default=0)
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{path}: {state}, {size} bytes where its header wants {expected}; copy it again"
        )
    in_order = sorted(tensors, key=lambda name: ends[name])
    return WeightFile(path.name, {name: tensors[name] for name in in_order}, metadata)


def write_weight_file(folder: Path, *, file: WeightFile, read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file tensor by tensor.

    Args:
        folder: where `file.name` is created.
        file: tensors in the order in which they are written.
        read: gives the tensor of a name; its dtype and shape must be those in `file`.
    """
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    offset = 0
    for name, info in file.tensors.items():
        end = offset + info.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with (folder / file.name).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
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


def plan_shards(tensors: dict[str, TensorInfo], *, max_shard_bytes: int) -> list[WeightFile]:
    """Fill files in order up to `max_shard_bytes`; a larger tensor gets a file of its own."""
    groups: list[dict[str, TensorInfo]] = [{}]
    room = max_shard_bytes
    for name, info in tensors.items():
        if info.num_bytes > room and groups[-1]:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = info
        room -= info.num_bytes
    names = _shard_names(len(groups))
    return [WeightFile(name, group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)]


def _shard_names(count: int) -> Iterator[str]:
    for i in range(count):
        yield SINGLE_FILE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def index_text(files: Sequence[WeightFile]) -> str:
    """Contents of `model.safetensors.index.json` for these files."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": sum(file.num_bytes for file in files)}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
