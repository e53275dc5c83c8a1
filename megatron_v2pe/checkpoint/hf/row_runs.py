"""Which rows of which tensors a tensor is made of, so that it can be written while it is read, block by block.

    rows_of_ours   our parameter, from top to bottom, as runs of rows of its Hugging Face tensors
    rows_of_hf     a Hugging Face tensor, from top to bottom, as runs of rows of our parameter

Both are found by sending row numbers, instead of weights, through the transform of the names table; there is no second
description of the transforms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.hf.map import Entry


@dataclass(frozen=True)
class Run:
    """Rows [start, stop) of the tensor `name`."""

    name: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the run."""
        return self.stop - self.start


def rows_of_ours(entry: Entry) -> list[Run]:
    """Our parameter as runs of Hugging Face rows.

    With 2 kv groups of 2 queries, heads of 1 row, from three tensors: q[0:2] k[0:1] v[0:1] q[2:4] k[1:2] v[1:2].
    """
    sizes = _part_rows(entry)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    runs = []
    for first, last in _stretches(_source_rows(entry), cuts=starts):
        part = next(i for i, end in enumerate(starts[1:]) if first < end)
        runs.append(Run(entry.hf[part], first - starts[part], last - starts[part]))
    return runs


def rows_of_hf(entry: Entry, hf_name: str) -> list[Run]:
    """One Hugging Face tensor as runs of rows of our parameter."""
    sizes = _part_rows(entry)
    part = entry.hf.index(hf_name)
    first = sum(sizes[:part])
    ours = _source_rows(entry).argsort()  # Hugging Face row, counted through all parts -> our row
    return [Run(entry.ours, a, b) for a, b in _stretches(ours[first : first + sizes[part]])]


def in_blocks(runs: Iterable[Run], *, rows_per_block: int) -> Iterator[list[Run]]:
    """Cut and group runs so that each group has at most `rows_per_block` rows."""
    block: list[Run] = []
    room = rows_per_block
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            block.append(Run(run.name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield block
                block, room = [], rows_per_block
    if block:
        yield block


def _part_rows(entry: Entry) -> list[int]:
    return [shape[0] for shape in entry.hf_shapes]


def _source_rows(entry: Entry) -> Tensor:
    """For each row of ours the row of the Hugging Face tensors, counted through all parts; int64 [rows]."""
    sizes = _part_rows(entry)
    numbers = torch.arange(sum(sizes))
    rows = entry.transform.to_ours(list(numbers.split(sizes)))
    if not torch.equal(rows.sort().values, numbers):
        raise TypeError(f"{entry.ours}: {entry.transform} does more than moving rows")
    return rows


def _stretches(rows: Tensor, *, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Numbers that follow one another, as [first, last); a stretch also ends before each value of `cuts`."""
    is_start = rows.diff() != 1
    if cuts:
        is_start |= torch.isin(rows[1:], torch.tensor(cuts))
    edges = [0, *(is_start.nonzero().flatten() + 1).tolist(), len(rows)]
    for a, b in pairwise(edges):
        yield int(rows[a]), int(rows[b - 1]) + 1
