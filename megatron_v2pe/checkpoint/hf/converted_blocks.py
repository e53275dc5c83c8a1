"""Rows of stored tensors -> bytes of a new one, block by block: moved, cut, cast, and checked for NaN and Inf.

runs of rows --read--> [rows, ...] --cut padding columns, cast--> bytes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.files.block_stream import BLOCK_BYTES, Block
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.hf.row_runs import RowRun, in_blocks

Dtype = Literal["keep", "bfloat16", "float16", "float32"]
"""Dtype to which a conversion casts floating point tensors; `keep` casts none."""

Progress = Callable[[int], None]
"""Called with the number of bytes of each converted block, from one thread."""


class RowReader(Protocol):
    """Where rows come from: a Hugging Face folder, or the state of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor."""

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) into `out`, contiguous [stop - start, ...]."""


def silent(num_bytes: int) -> None:
    """Progress that is not shown."""


def converted_info(info: TensorInfo, dtype: Dtype) -> TensorInfo:
    """Dtype and shape after the cast; integers keep their dtype."""
    if dtype == "keep" or not info.dtype.is_floating_point:
        return info
    return TensorInfo(getattr(torch, dtype), info.shape)


def converted_blocks(
    reader: RowReader,
    runs: Sequence[RowRun],
    *,
    target: TensorInfo,
    not_finite: Counter[str],
    progress: Progress = silent,
) -> Iterator[Block]:
    """The bytes of a new tensor.

    Args:
        reader: has the tensors that `runs` name, all of one dtype and with equal rows.
        runs: rows of the new tensor, from top to bottom.
        target: dtype and shape of the new tensor; columns beyond its shape are left out.
        not_finite: receives the number of NaN and Inf after the cast, by name of the source tensor.
        progress: called with the bytes of each block of the new tensor.
    """
    stored = reader.tensors[runs[0].name]
    unpadded = (slice(None), *(slice(size) for size in target.shape[1:]))

    def fill(memory: Tensor, block: Sequence[RowRun]) -> Tensor:
        rows = memory.view(stored.dtype).view(-1, *stored.shape[1:])
        sizes = [run.num_rows for run in block]
        for run, out in zip(block, rows.split(sizes), strict=True):
            reader.read_rows(run.name, run.start, run.stop, out)
        new = rows[unpadded].to(target.dtype).contiguous()
        if not _is_finite(new):
            for run, values in zip(block, new.split(sizes), strict=True):
                not_finite[run.name] += int(values.isfinite().logical_not().sum())
        progress(new.numel() * new.itemsize)
        return new.reshape(-1).view(torch.uint8)

    for block in in_blocks(runs, rows_per_block=max(1, BLOCK_BYTES // max(1, stored.row_bytes))):
        num_rows = sum(run.num_rows for run in block)
        yield Block(num_rows * stored.row_bytes, partial(fill, block=block))


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point() or values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN if there is one; a thirtieth of the time of isfinite
    return bool(low.isfinite() and high.isfinite())


def not_finite_message(not_finite: Mapping[str, int], *, shown: int = 20) -> str:
    """One warning for all tensors with NaN or Inf; empty when there are none."""
    if not not_finite:
        return ""
    names = sorted(name for name, count in not_finite.items() if count)
    lines = [f"{name}: {not_finite[name]:,} values" for name in names[:shown]]
    more = [f"... and {len(names) - shown} more tensors"] if len(names) > shown else []
    total = sum(not_finite.values())
    return "\n  ".join([f"{total:,} values in {len(names)} tensors are NaN or infinite:", *lines, *more])
