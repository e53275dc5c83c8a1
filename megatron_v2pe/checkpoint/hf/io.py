"""Hugging Face weight folders: list what is there, read rows of tensors, lay out new files.

    folder/  model.safetensors                                   one file
             model-0000k-of-0000n.safetensors + index.json       or shards, the index says which tensor is where
             pytorch_model*.bin                                  the same as pickle, read only on demand
             everything else                                     configuration, tokenizer, code: side files

Headers are parsed here, because they give order, sizes and truncation without touching data, and where in the file
the bytes of each tensor are. Key order and metadata of a header are kept, so that a folder written from the same
layout is the same file, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_v2pe.checkpoint.files.range_reader import RangeReader
from megatron_v2pe.checkpoint.files.tensor_files import (
    TensorInfo,
    WeightFile,
    read_header,
)
from megatron_v2pe.checkpoint.hf.pickle_files import read_pickle
from megatron_v2pe.core.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_PICKLE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
"""Files that hold weights in some form; none of them is a side file."""
SKIPPED_FOLDERS = (".git", ".cache", "__pycache__")


class HFWeights:
    """The weights of a Hugging Face folder. Opening it reads headers only.

    Args:
        folder: the folder.
        allow_pickle: open pickle files too where there is no safetensors file; tensors only, no code is run.

    Attributes:
        files: weight files in the order of their names.
        tensors: all tensors, file by file in data order.
        problems: everything that is wrong with the folder, one sentence each; reading is only sound when empty.
    """

    def __init__(self, folder: str | Path, *, allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        self._allow_pickle = allow_pickle
        self.files: list[WeightFile] = []
        self.problems: list[str] = []
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._pickled: dict[str, Tensor] = {}
        self._handles: dict[str, Any] = {}
        self._ranges = RangeReader(self.folder)
        if not self.folder.is_dir():
            self.problems.append(f"{self.folder}: no such folder")
            return
        for name in self._find_files():
            self._open(name)
        self._check_index()

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped from its file."""
        return self._pickled[name] if name in self._pickled else self._handle(name).get_tensor(name)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of one tensor, one slice for each dimension; nothing else of the file is touched."""
        if name in self._pickled:
            return self._pickled[name][box]
        return self._handle(name).get_slice(name)[box]

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of a tensor.

        Args:
            name: of the tensor.
            start: first row.
            stop: row after the last.
            out: takes them; contiguous, of the stored dtype, [stop - start, ...].

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        if name in self._pickled:
            out.copy_(self._pickled[name][start:stop])
            return
        offset = self._starts[name] + start * self.tensors[name].row_bytes
        try:
            self._ranges.read_into(out, file=self._file_of[name], offset=offset)
        except OSError as error:
            path = self.folder / self._file_of[name]
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from error

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
        return sorted(path for path in found if _is_side_file(path))

    def _find_files(self) -> list[str]:
        index = self._read_index(self._index_file)
        if index:
            return sorted(set(index.values()))
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if SINGLE_FILE in found or len(found) == 1:
            return [SINGLE_FILE] if SINGLE_FILE in found else found
        if found:
            self.problems.append(f"{self.folder}: {len(found)} safetensors files but no {INDEX_FILE}")
            return []
        return self._find_pickles()

    def _find_pickles(self) -> list[str]:
        found = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if not found:
            self.problems.append(f"{self.folder}: no {SINGLE_FILE} and no {INDEX_FILE}")
        elif not self._allow_pickle:
            self.problems.append(
                f"{self.folder}: the weights are pickle files ({found[0]}), which can run code when they are "
                "opened; save them as safetensors first (save_pretrained(..., safe_serialization=True)), or let "
                "--allow-pickle read them, tensors only"
            )
            return []
        elif SINGLE_PICKLE in found:  # beside it may be the optimizer's, or arguments of a training script
            return [SINGLE_PICKLE]
        elif len(found) > 1:
            self.problems.append(f"{self.folder}: {len(found)} pickle files but no {PICKLE_INDEX_FILE}")
            return []
        return found

    @property
    def _index_file(self) -> str:
        """The index that counts: safetensors' if there is one, else that of allowed pickles."""
        is_pickle = self._allow_pickle and not any(self.folder.glob("*.safetensors*"))
        return PICKLE_INDEX_FILE if is_pickle else INDEX_FILE

    def _read_index(self, index_file: str) -> dict[str, str]:
        path = self.folder / index_file
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            self.problems.append(f"{path}: not a weights index ({type(error).__name__}: {error})")
            return {}
        outside = sorted({file for file in index.values() if Path(file).name != file})
        if outside:
            self.problems.append(f"{path}: names files outside the folder: {', '.join(outside)}")
        return {name: file for name, file in index.items() if file not in outside}

    def _open(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self.problems.append(f"{path}: missing; {self._index_file} names this file")
            return
        try:
            file = self._open_pickle(path) if path.suffix in PICKLE_SUFFIXES else self._open_safetensors(path)
        except CheckpointError as error:
            self.problems.append(str(error))
            return
        self.files.append(file)
        self.tensors.update(file.tensors)
        self._file_of.update(dict.fromkeys(file.tensors, name))

    def _open_safetensors(self, path: Path) -> WeightFile:
        file, data_start = read_header(path)
        self._starts.update({name: data_start + start for name, start in file.offsets().items()})
        return file

    def _open_pickle(self, path: Path) -> WeightFile:
        """A pickle file as the safetensors file that it will be exported as."""
        tensors = read_pickle(path)
        self._pickled.update(tensors)
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        stem = path.stem.replace("pytorch_model", "model")
        return WeightFile(f"{stem}.safetensors", infos, {"format": "pt"})

    def _check_index(self) -> None:
        index_file = self._index_file
        known = len(self.problems)
        index = self._read_index(index_file)
        del self.problems[known:]  # said when the files were looked for
        opened = set(self._file_of.values())
        for name, file in index.items():
            if file in opened and self._file_of.get(name) != file:
                self.problems.append(
                    f"{self.folder / index_file}: names {name!r} in {file}, but it is not there"
                )
        if index:
            for name in sorted(set(self._file_of) - set(index)):
                self.problems.append(
                    f"{self.folder / self._file_of[name]}: holds {name!r}, which {index_file} omits"
                )


def _is_side_file(path: Path) -> bool:
    """Neither weights nor an index of pickles; export would carry that along without the files that it names."""
    return path.suffix not in WEIGHT_SUFFIXES and path.name != PICKLE_INDEX_FILE


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
