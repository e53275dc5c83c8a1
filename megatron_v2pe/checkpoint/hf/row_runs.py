"""Which rows of which tensors make up a tensor, so that it can be written while it is read, block by block.

    rows_of_ours   our parameter, from top to bottom, as runs of rows of its Hugging Face tensors
    rows_of_hf     a Hugging Face tensor, from top to bottom, as runs of rows of our parameter

Both are found by applying the transform of the names table to row numbers instead of weights; there is no second
description of the transforms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.hf.name_map import Entry


@dataclass(frozen=True)
class RowRun:
    """Rows [start, stop) of the tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the run."""
        return self.stop - self.start


def rows_of_ours(entry: Entry) -> list[RowRun]:
    """Our parameter as runs of Hugging Face rows.

    With 2 kv groups of 2 queries, heads of 1 row, from three tensors: q[0:2] k[0:1] v[0:1] q[2:4] k[1:2] v[1:2].
    """
    sizes = _num_rows(entry)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    runs = []
    for first, last in _consecutive(_source_rows(entry), cuts=starts):
        index = next(i for i, end in enumerate(starts[1:]) if first < end)
        runs.append(RowRun(entry.hf[index], first - starts[index], last - starts[index]))
    return runs


def rows_of_hf(entry: Entry, hf_name: str) -> list[RowRun]:
    """One Hugging Face tensor as runs of rows of our parameter."""
    sizes = _num_rows(entry)
    index = entry.hf.index(hf_name)
    first = sum(sizes[:index])
    ours = _source_rows(entry).argsort()  # Hugging Face row, counted through all tensors -> our row
    return [RowRun(entry.ours, a, b) for a, b in _consecutive(ours[first : first + sizes[index]])]


def in_blocks(runs: Iterable[RowRun], *, rows_per_block: int) -> Iterator[list[RowRun]]:
    """Cut and group runs so that each group has at most `rows_per_block` rows."""
    block: list[RowRun] = []
    room = rows_per_block
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            block.append(RowRun(run.name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield block
                block, room = [], rows_per_block
    if block:
        yield block


def _num_rows(entry: Entry) -> list[int]:
    return [shape[0] for shape in entry.hf_shapes]


def _source_rows(entry: Entry) -> Tensor:
    """For each row of ours the row of the Hugging Face tensors, counted through all tensors; int64 [rows]."""
    sizes = _num_rows(entry)
    numbers = torch.arange(sum(sizes))
    rows = entry.transform.to_ours(list(numbers.split(sizes)))
    if not torch.equal(rows.sort().values, numbers):
        raise TypeError(f"{entry.ours}: {entry.transform} does more than moving rows")
    return rows


def _consecutive(rows: Tensor, *, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Consecutive numbers, as [first, last); a range also ends before each value of `cuts`."""
    is_start = rows.diff() != 1
    if cuts:
        is_start |= torch.isin(rows[1:], torch.tensor(cuts))
    edges = [0, *(is_start.nonzero().flatten() + 1).tolist(), len(rows)]
    for a, b in pairwise(edges):
        yield int(rows[a]), int(rows[b - 1]) + 1
