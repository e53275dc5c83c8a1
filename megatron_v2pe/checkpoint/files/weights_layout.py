"""`hf/weights_layout.json`: how the weights of a checkpoint are laid out in Hugging Face files.

A checkpoint holds no Hugging Face weight files, so this file records their names, order, dtypes, shapes and metadata:
an export writes the same files, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.tensor_files import DTYPE_NAMES, DTYPES, TensorInfo, WeightFile
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

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
        values = json.loads(path.read_text(encoding="utf-8"))["files"]
        return [WeightFile(v["name"], _tensors(v["tensors"]), v["metadata"]) for v in values]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; the checkpoint's hf/ folder is not one that import-hf wrote"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _tensors(rows: list[list[Any]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(DTYPES[dtype], tuple(shape)) for name, dtype, shape in rows}
