"""`.metadata` of a state folder, read without running anything that it contains.

    pickle --restricted unpickler--> inert records --types and bounds--> torch's Metadata

torch writes this file as a pickle and reads it with `pickle.load`, which runs whatever the file asks for. Here a class
that the file names becomes a record that only keeps what it was given; names outside of `_CLASSES` are refused, and so
are opcodes that torch's writer never uses. What is read is then built anew out of checked numbers and names, so that
nothing of the file but plain values reaches torch or mcore.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_v2pe.checkpoint.files.tensor_files import DTYPES
from megatron_v2pe.checkpoint.state.private_api import StorageInfo
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import read_plain

METADATA_FILE = ".metadata"
_MAX_BYTES = 2**30
_MOST = 2**60  # rows, columns, bytes
_MOST_DIMENSIONS = 16
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = frozenset(
    {(_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")}
    | {(_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "MetadataIndex")}
    | {(_METADATA, name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")}
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    # mcore's own writer leaves its plan in the file; nobody reads it.
    | {("torch.distributed.checkpoint.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")}
    | {("torch.distributed.checkpoint.planner", name) for name in ("TensorWriteData", "BytesIOWriteData")}
    | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}
)
_STORED_DTYPES = {str(dtype): dtype for dtype in (*DTYPES.values(), torch.complex64, torch.complex128)} | {
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
}
_REFUSED_OPCODES = frozenset(
    getattr(pickle, name)[0]
    for name in (
        *("PERSID", "BINPERSID", "INST", "OBJ", "EXT1", "EXT2", "EXT4"),
        *("NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8", "NEWOBJ_EX"),
    )
)


class _Record:
    """What an object of the file was made of: the class that it names, its arguments, its state."""

    name = ""

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def fields(self) -> dict[str, Any]:
        """The state of an object that has named fields."""
        if not isinstance(self.state, dict):
            raise TypeError(f"{self.name} without fields")
        return self.state


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]  # in Python: its opcodes can be taken away
    dispatch: ClassVar[dict[int, Any]] = {
        code: read
        for code, read in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if code not in _REFUSED_OPCODES
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._classes: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A record class of its own for each name, made for this file alone."""
        full = f"{module}.{name}"
        if full in _STORED_DTYPES:
            return _STORED_DTYPES[full]
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(
                f"it names {full[:80]}, which no checkpoint needs; the file may be an attack and nothing of it was run"
            )
        return self._classes.setdefault(full, type("_Record", (_Record,), {"name": name}))


def read_metadata(folder: Path) -> Metadata:
    """What a state folder holds, and where.

    Raises:
        CheckpointError: the file is missing, damaged, or asks for what no checkpoint needs.
    """
    path = Path(folder) / METADATA_FILE
    try:
        root = _Unpickler(read_plain(path, max_bytes=_MAX_BYTES)).load()
        return _metadata(root)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, so the tensors of {folder} cannot be found") from None
    except CheckpointError:
        raise
    except (KeyError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__})") from None
    except Exception as error:  # of a damaged pickle, any opcode may fail in any way
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {str(error)[:300]})") from None


def _metadata(root: Any) -> Metadata:
    fields = _of(root, "Metadata").fields()
    stored = {_name(key): _stored(value) for key, value in _dict(fields["state_dict_metadata"]).items()}
    places = {_index(key): _place(value) for key, value in _dict(fields["storage_data"]).items()}
    return Metadata(state_dict_metadata=stored, storage_data=places, storage_meta=StorageMeta())


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _Record) and value.name == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _of(value, "TensorStorageMetadata").fields()
    size = _size(fields["size"])
    chunks = [_box(chunk, size) for chunk in _list(fields["chunks"])]
    properties = _of(fields["properties"], "TensorProperties")
    return TensorStorageMetadata(TensorProperties(dtype=_dtype(properties)), size, chunks)


def _dtype(properties: _Record) -> torch.dtype:
    state = properties.state
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without dtype")
    return dtype


def _box(value: Any, size: torch.Size) -> ChunkStorageMetadata:
    fields = _of(value, "ChunkStorageMetadata").fields()
    offsets, sizes = _size(fields["offsets"]), _size(fields["sizes"])
    if not len(offsets) == len(sizes) == len(size):
        raise ValueError(f"a box of {len(sizes)} dimensions in a tensor of {len(size)}")
    if any(a + n > whole for a, n, whole in zip(offsets, sizes, size, strict=True)):
        raise ValueError(f"a box {tuple(sizes)} at {tuple(offsets)}, beyond its tensor of {tuple(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _index(value: Any) -> MetadataIndex:
    fields = _of(value, "MetadataIndex").fields()
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _name(fields["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _number(index),
    )


def _place(value: Any) -> StorageInfo:
    fields = _of(value, "_StorageInfo").fields()
    if fields.get("transform_descriptors"):
        raise ValueError("a file whose contents are transformed")
    name = _name(fields["relative_path"])
    if Path(name).name != name or name in (".", ".."):
        raise ValueError(f"a file outside the folder, {name!r}")
    return StorageInfo(name, _number(fields["offset"]), _number(fields["length"]))


def _of(value: Any, name: str) -> _Record:
    if not isinstance(value, _Record) or value.name != name:
        raise TypeError(f"{type(value).__name__} where {name} is expected")
    return value


def _size(value: Any) -> torch.Size:
    numbers = _of(value, "Size").arguments
    values = numbers[0] if len(numbers) == 1 else None
    if not isinstance(values, (tuple, list)) or len(values) > _MOST_DIMENSIONS:
        raise TypeError("not a size")
    return torch.Size([_number(number) for number in values])


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{str(value)[:40]!r} where a count is expected")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a name is expected")
    return value


def _dict(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise TypeError(f"{type(value).__name__} where a dict is expected")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"{type(value).__name__} where a list is expected")
    return value
