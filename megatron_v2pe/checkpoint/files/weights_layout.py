"""`hf/weights_layout.json`: how the weights of a checkpoint are laid out in Hugging Face files.

A checkpoint holds no Hugging Face weight files, so this file records their names, order, dtypes, shapes and metadata:
an export writes the same files, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.tensor_files import DTYPE_NAMES, DTYPES, TensorInfo, WeightFile, shape_of
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.plain_files import read_json_object

LAYOUT_FILE = "weights_layout.json"


def write_layout(hf_folder: Path, files: Sequence[WeightFile]) -> None:
    """Record the layout of weight files in the `hf/` folder of a checkpoint."""
    values = [
        {
            "name": file.name,
            "metadata": file.metadata,
            "tensors": [
                [name, DTYPE_NAMES[info.dtype], list(info.shape)] for name, info in file.tensors.items()
            ],
        }
        for file in files
    ]
    write_atomic(hf_folder / LAYOUT_FILE, json.dumps({"files": values}))


def read_layout(hf_folder: Path) -> list[WeightFile]:
    """Read what `write_layout` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = hf_folder / LAYOUT_FILE
    try:
        values = read_json_object(path)["files"]
        return [
            WeightFile(_file_name(v["name"]), _tensors(v["tensors"]), _metadata(v["metadata"]))
            for v in values
        ]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; the checkpoint's hf/ folder is not one that import-hf wrote"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _tensors(rows: list[list[Any]]) -> dict[str, TensorInfo]:
    return {str(name): TensorInfo(DTYPES[dtype], shape_of(shape)) for name, dtype, shape in rows}


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or Path(value).name != value or Path(value).suffix != ".safetensors":
        raise ValueError(f"{value!r} is no name of a safetensors file in the folder")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TypeError("metadata must be an object of texts")
    return value
