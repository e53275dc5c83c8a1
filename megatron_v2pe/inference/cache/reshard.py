"""Rows of a saved document for another layout of ranks.

    saved   tp 2, cp 1     rank (0, 0): heads 0..3, tokens 0..n-1     rank (1, 0): heads 4..7, tokens 0..n-1
    here    tp 1, cp 2     rank (0, 0): heads 0..7, half the tokens   rank (0, 1): heads 0..7, the other half

A row is a token and a head, and does not depend on who held it: each rank picks its heads and tokens from the files
that have them. Pipeline stages are layers, which have the same numbers in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.inference.chunks import Span, tokens_held
from megatron_v2pe.v2pe.layout import Int64Array


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes over which keys and values are spread."""

    tp: int
    pp: int
    cp: int


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A place in a layout."""

    tp: int = 0
    pp: int = 0
    cp: int = 0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a rank needs of a saved document.

    Attributes:
        layout: of the ranks here.
        rank: this one.
        layers: numbers of its decoder layers.
        kv_heads: of the whole model.
    """

    layout: Layout
    rank: Rank
    layers: Sequence[int]
    kv_heads: int


OpenFile = Callable[[Rank], AbstractContextManager[Any]]  # of safetensors: keys() and get_tensor(name)


def spans_for(spans: Sequence[Span], cp: int) -> list[Span]:
    """The same tokens, padded for another number of context parallel ranks."""
    multiple = 2 * cp if cp > 1 else 1
    return [
        Span(
            start=span.start,
            stop=span.stop,
            padded=-(-(span.stop - span.start) // multiple) * multiple if span.padded else 0,
        )
        for span in spans
    ]


def tokens_of(spans: Sequence[Span], *, cp: int, rank: int) -> Int64Array:
    """Tokens that a rank holds, in the order of its rows, which is rising."""
    return tokens_held(spans, 0, spans[-1].stop if spans else 0, cp=cp, rank=rank)


def heads_of(kv_heads: int, *, tp: int, rank: int) -> range:
    """Key heads of a tensor parallel rank; with more ranks than heads several have the same one."""
    first = rank * kv_heads // tp
    return range(first, first + max(1, kv_heads // tp))


def resharded(
    open_file: OpenFile, saved: Layout, spans: Sequence[Span], wanted: Wanted
) -> tuple[list[Span], dict[str, Tensor]]:
    """Spans and rows of this rank, as `KVCache.restore` takes them.

    Args:
        open_file: opens the file of a saved rank.
        saved: layout of the files.
        spans: of the document in that layout.
        wanted: of this rank.

    Raises:
        KeyError: a layer is in no file, or a file has other rows than `spans` say.
    """
    mine = spans_for(spans, wanted.layout.cp)
    tokens = tokens_of(mine, cp=wanted.layout.cp, rank=wanted.rank.cp)
    heads = heads_of(wanted.kv_heads, tp=wanted.layout.tp, rank=wanted.rank.tp)
    rows: dict[str, Tensor] = {}
    for source in _sources(saved, wanted, heads):
        held = tokens_of(spans, cp=saved.cp, rank=source.cp)
        is_mine = np.isin(held, tokens)
        take = torch.from_numpy(np.flatnonzero(is_mine))
        put = torch.from_numpy(np.searchsorted(tokens, held[is_mine]))
        theirs = heads_of(wanted.kv_heads, tp=saved.tp, rank=source.tp)
        with open_file(source) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if int(name.split(".")[1]) not in wanted.layers:
                    continue
                found = file.get_tensor(name)  # [k, n, d]
                if found.shape[:2] != (len(theirs), len(held)):
                    raise KeyError(f"{name} has the shape {tuple(found.shape)}")
                if name not in rows:
                    rows[name] = found.new_empty(len(heads), len(tokens), found.shape[2])
                for head in theirs:
                    if head in heads:
                        rows[name][head - heads.start, put] = found[head - theirs.start, take]
    missing = [layer for layer in wanted.layers if f"keys.{layer}" not in rows]
    if missing:
        raise KeyError(f"layers {missing} are in no file")
    return mine, rows


def _sources(saved: Layout, wanted: Wanted, heads: range) -> Iterator[Rank]:
    """Saved ranks with heads of this one; the first of several with the same heads."""
    known: set[int] = set()
    for tp in range(saved.tp):
        theirs = heads_of(wanted.kv_heads, tp=saved.tp, rank=tp)
        if theirs.start in known or not set(theirs) & set(heads):
            continue
        known.add(theirs.start)
        for pp in range(saved.pp):
            for cp in range(saved.cp):
                yield Rank(tp=tp, pp=pp, cp=cp)
