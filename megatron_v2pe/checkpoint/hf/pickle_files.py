"""Weights in pickle files, for folders that have nothing else; torch reads them with `weights_only`: no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.files.tensor_files import DTYPE_NAMES
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle file, memory-mapped; anything but a dict of tensors is refused, by torch or here.

    Raises:
        CheckpointError: not such a file.
    """
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # of a damaged pickle, any opcode may fail in any way
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: not a file of tensors alone, or written before torch 1.6 ({first_line}); save it as safetensors "
            "with the program that wrote it"
        ) from None
    foreign = (
        [k for k, v in state.items() if not isinstance(k, str) or not _is_plain(v)]
        if isinstance(state, dict)
        else [path.name]
    )
    if foreign:
        raise CheckpointError(
            f"{path}: {shortened(foreign[0])} is no tensor that holds its values under a name; only a dict of tensors "
            "can be imported"
        )
    return state


def _is_plain(value: Any) -> bool:
    """A tensor whose values are all stored, one by one: not sparse, quantised, or repeated by its strides."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPE_NAMES
        and value.untyped_storage().nbytes() >= value.numel() * value.dtype.itemsize
    )
