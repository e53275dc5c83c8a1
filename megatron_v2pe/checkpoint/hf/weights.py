"""The weights of a Hugging Face folder: what it holds, and rows of its tensors.

Opening a folder reads headers only: they give order, dtypes, shapes and truncation, and the place of each tensor's
bytes, which `read_rows` reads from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megatron_v2pe.checkpoint.files.range_reader import RangeReader
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile, read_header
from megatron_v2pe.checkpoint.hf.pickle_files import read_pickle
from megatron_v2pe.checkpoint.hf.weight_files import PICKLE_SUFFIXES, list_weight_files
from megatron_v2pe.core.errors import CheckpointError


class HFWeights:
    """The weights of a Hugging Face folder.

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
        self.files: list[WeightFile] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self._file_of: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._pickled: dict[str, Tensor] = {}
        self._memory_maps: dict[str, Any] = {}
        self._ranges = RangeReader(self.folder)
        if not self.folder.is_dir():
            self.problems.append(f"{self.folder}: no such folder")
            return
        listing = list_weight_files(self.folder, allow_pickle=allow_pickle)
        self.problems += listing.problems
        for name in listing.names:
            if (self.folder / name).is_file():
                self._open(name)
            else:
                self.problems.append(
                    f"{self.folder / name}: missing; {listing.index_path.name} names this file"
                )
        self.problems += listing.disagreements(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, memory-mapped from its file."""
        return self._pickled[name] if name in self._pickled else self._memory_map(name).get_tensor(name)

    def read_box(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A slice of one tensor along each dimension; nothing else of the file is read."""
        if name in self._pickled:
            return self._pickled[name][box]
        return self._memory_map(name).get_slice(name)[box]

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of a tensor.

        Args:
            name: of the tensor.
            start: first row.
            stop: row after the last.
            out: receives them; contiguous, of the stored dtype, [stop - start, ...].

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

    def _memory_map(self, name: str) -> Any:
        """The open memory map of the file that holds a tensor."""
        file = self._file_of[name]
        if file not in self._memory_maps:
            self._memory_maps[file] = safe_open(self.folder / file, framework="pt")
        return self._memory_maps[file]

    def _open(self, name: str) -> None:
        path = self.folder / name
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
