"""A checkpoint as the Hugging Face folder that it exports to: names, dtypes, shapes, and the bytes of each tensor.

weights_layout.json --as_stored--> files        state --blocks--> bytes, row by row
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.adapters.merge import open_state
from megatron_v2pe.checkpoint.files.block_stream import Block
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile
from megatron_v2pe.checkpoint.files.weights_layout import LAYOUT_FILE, read_layout
from megatron_v2pe.checkpoint.hf.converted_blocks import (
    Dtype,
    Progress,
    RowReader,
    converted_blocks,
    converted_info,
    silent,
)
from megatron_v2pe.checkpoint.hf.name_map import NameMap, name_map, other_names
from megatron_v2pe.checkpoint.hf.row_runs import rows_of_hf
from megatron_v2pe.checkpoint.hf.tables import spelling_of
from megatron_v2pe.config.arch.architecture import read_architecture


class ConvertedTensors:
    """Our parameters under the Hugging Face names of a table.

    Args:
        state: where rows of our parameters are read.
        names: the table.
        dtype: cast floating point tensors.
        progress: called with the bytes of each block that is read.

    Attributes:
        not_finite: number of NaN and Inf that were read, by our names.
    """

    def __init__(
        self, state: RowReader, names: NameMap, *, dtype: Dtype = "keep", progress: Progress = silent
    ) -> None:
        self.names = names
        self.not_finite: Counter[str] = Counter()
        self._state = state
        self._tensors = state.tensors
        self._dtype = dtype
        self._progress = progress

    def infos(self) -> dict[str, TensorInfo]:
        """Every Hugging Face name with its dtype, after the cast, and its shape, without padding."""
        return {name: self._info(name) for name in self.names.by_hf}

    def _info(self, hf_name: str) -> TensorInfo:
        stored = self._tensors[self.names.by_hf[hf_name].ours]
        return converted_info(TensorInfo(stored.dtype, self.names.hf_shape(hf_name)), self._dtype)

    def blocks(self, hf_name: str) -> Iterator[Block]:
        """The bytes of one tensor, read when each block is filled."""
        return converted_blocks(
            self._state,
            rows_of_hf(self.names.by_hf[hf_name], hf_name),
            target=self._info(hf_name),
            not_finite=self.not_finite,
            progress=self._progress,
        )

    def read(self, hf_name: str) -> Tensor:
        """One tensor, whole."""
        info = self._info(hf_name)
        whole = torch.empty(info.num_bytes, dtype=torch.uint8)
        first = 0
        for block in self.blocks(hf_name):
            data = block.fill(torch.empty(block.num_bytes, dtype=torch.uint8))
            whole[first : first + data.numel()] = data
            first += data.numel()
        return whole.view(info.dtype).view(info.shape)


class ExportedTensors(ConvertedTensors):
    """A checkpoint's tensors under the Hugging Face names of the folder that it came from.

    Args:
        checkpoint_folder: a complete checkpoint; one of adapters appears merged into its base.
        dtype: cast floating point tensors.
        progress: called with the bytes of each block that is read.
        in_other_format: names are those of the other Hugging Face format.

    Attributes:
        names: the table of its architecture.
        state: the stored tensors.

    Raises:
        CheckpointError: the checkpoint lacks parameters of its own architecture.
    """

    def __init__(
        self,
        checkpoint_folder: str | Path,
        *,
        dtype: Dtype = "keep",
        progress: Progress = silent,
        in_other_format: bool = False,
    ) -> None:
        arch = read_architecture(hf_path(checkpoint_folder))
        stored = [name for file in read_layout(hf_path(checkpoint_folder)) for name in file.tensors]
        names = other_names(arch) if in_other_format else name_map(arch, spelling_of(arch, stored))
        self.state = open_state(checkpoint_folder)
        super().__init__(self.state, names, dtype=dtype, progress=progress)
        missing = sorted(set(self.names.by_ours) - set(self.state.tensors))
        raise_problems(f"{checkpoint_folder}: lacks parameters", missing)

    def as_stored(self, file: WeightFile) -> WeightFile:
        """The same file with the dtypes of the checkpoint (a bfloat16 run of a float32 import)."""
        unknown = sorted(set(file.tensors) - set(self.names.by_hf))
        raise_problems(f"{self.state.folder.parent}: {LAYOUT_FILE} names unknown tensors", unknown)
        infos = self.infos()
        return WeightFile(file.name, {name: infos[name] for name in file.tensors}, file.metadata)
