"""Tensors of a folder of weights, and how two folders differ; one tensor in memory at a time.

    Hugging Face folder --headers---> TensorFolder: name -> dtype, shape; read(name)
    checkpoint folder   --metadata--> the same, under state keys, or under Hugging Face names

The folder of a run means its newest checkpoint. Two folders of different kinds are compared under Hugging Face names,
the only ones that both have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.convert.exported_tensors import ExportedTensors
from megatron_v2pe.checkpoint.files.folder import INFO_FILE, CheckpointInfo, read_info, state_path
from megatron_v2pe.checkpoint.files.hashing import VerifyLevel
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, tensor_bytes
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.checkpoint.retention import LATEST_FILE, checkpoints_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.errors import CheckpointError

_BLOCK = 2**22  # numbers that are widened to float64 at a time


@dataclass
class TensorFolder:
    """Tensors of a folder.

    Attributes:
        folder: the folder; for a run, its newest checkpoint.
        tensors: name -> dtype and shape.
        read: gives one tensor.
        info: contents of checkpoint.json; None for a Hugging Face folder.
        problems: what is wrong with a Hugging Face folder; the tensors that can be read are listed all the same.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    info: CheckpointInfo | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a user means: itself, or the newest one of a run's folder.

    Raises:
        CheckpointError: neither a checkpoint, nor a folder whose `latest` names one.
    """
    path = Path(path)
    for root in (path, checkpoints_path(path)):
        pointer = root / LATEST_FILE
        if pointer.is_file() and not (root / INFO_FILE).is_file():
            named = root / pointer.read_text(errors="replace").strip()
            if not (named / INFO_FILE).is_file():
                others = ", ".join(sorted(found.parent.name for found in root.glob(f"step_*/{INFO_FILE}")))
                raise CheckpointError(
                    f"{pointer} names {named.name}, which is no checkpoint; name one yourself: {others or 'none left'}"
                )
            return named
    return path


def open_folder(path: str | Path, *, hf_names: bool = False, verify: VerifyLevel = "sizes") -> TensorFolder:
    """List the tensors of a Hugging Face folder, a checkpoint, or a run.

    Args:
        path: the folder.
        hf_names: list a checkpoint's weights under their Hugging Face names (and nothing of its optimizer).
        verify: how closely a checkpoint's files are checked.

    Raises:
        CheckpointError: nothing in the folder can be listed.
    """
    folder = find_checkpoint(path)
    if not (folder / INFO_FILE).is_file() and (folder / "config.json").is_file():
        weights = HFWeights(folder)
        if not weights.tensors:
            raise CheckpointError("\n  ".join(weights.problems))
        return TensorFolder(folder, weights.tensors, weights.read, problems=weights.problems)
    info = read_info(folder, verify=verify)
    if not hf_names:
        reader = StateReader(state_path(folder))
        return TensorFolder(folder, reader.tensors, reader.read, info)
    exported = ExportedTensors(folder)
    return TensorFolder(folder, exported.infos(), exported.read, info)


def matching(names: list[str], pattern: str) -> list[str]:
    """Names that contain `pattern`, or match it where it has wildcards."""
    if any(character in pattern for character in "*?["):
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if pattern in name]


@dataclass(frozen=True)
class TensorStats:
    """Values of a tensor: extremes and mean of the finite ones, and how many are not."""

    minimum: float
    maximum: float
    mean: float
    num_nan: int
    num_inf: int


def stats_of(tensor: Tensor) -> TensorStats:
    """Statistics in float64, block by block."""
    low = math.inf
    high = -math.inf
    total = 0.0
    count = num_nan = num_inf = 0
    for block in _blocks(tensor):
        finite = block[block.isfinite()]
        num_nan += int(block.isnan().sum())
        num_inf += int(block.isinf().sum())
        if finite.numel():
            low = min(low, finite.min().item())
            high = max(high, finite.max().item())
            total += finite.sum().item()
            count += finite.numel()
    if count == 0:
        return TensorStats(math.nan, math.nan, math.nan, num_nan, num_inf)
    return TensorStats(low, high, total / count, num_nan, num_inf)


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two folders.

    Attributes:
        name: of the tensor.
        kind: only_first, only_second, shape, dtype or values; a dtype difference has the distance of values too.
        first: dtype and shape in the first folder, empty where it is missing.
        second: the same in the second folder.
        max_abs: largest absolute difference; None where shapes differ or one is missing, NaN where a value is.
    """

    name: str
    kind: str
    first: str = ""
    second: str = ""
    max_abs: float | None = None


def differences(first: TensorFolder, second: TensorFolder, names: list[str]) -> Iterator[TensorDifference]:
    """Compare tensors of two folders, in the order of `names`; equal ones are left out."""
    for name in names:
        here, there = first.tensors.get(name), second.tensors.get(name)
        sides = (_describe(here), _describe(there))
        if here is None or there is None:
            yield TensorDifference(name, "only_second" if here is None else "only_first", *sides)
        elif here.shape != there.shape:
            yield TensorDifference(name, "shape", *sides)
        else:
            a, b = first.read(name), second.read(name)
            if here.dtype != there.dtype:
                yield TensorDifference(name, "dtype", *sides, _max_abs(a, b))
            elif tensor_bytes(a) != tensor_bytes(b):  # bits: NaN equals NaN, 0.0 is not -0.0
                yield TensorDifference(name, "values", *sides, _max_abs(a, b))


def _describe(info: TensorInfo | None) -> str:
    return "" if info is None else f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def _max_abs(a: Tensor, b: Tensor) -> float:
    largest = 0.0
    for block_a, block_b in zip(_blocks(a), _blocks(b), strict=True):
        block_max = (block_a - block_b).abs().max().item()
        largest = block_max if math.isnan(block_max) else max(largest, block_max)
        if math.isnan(largest):
            break
    return largest


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's numbers in float64, some at a time."""
    yield from (
        block.to(torch.float64) for block in tensor.detach().reshape(-1).split(_BLOCK) if block.numel()
    )
