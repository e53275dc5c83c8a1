"""Rows of a document move to any other layout: every head and token once, whoever held them."""

import contextlib
import itertools

import pytest
import torch

from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace
from megatron_v2pe.inference.cache.reshard import (
    Layout,
    Rank,
    Wanted,
    heads_of,
    resharded,
    spans_for,
    tokens_of,
)
from megatron_v2pe.inference.chunks import Span

LAYERS, HEADS, DIM = 2, 4, 2
# 13 tokens prefilled in two chunks over cp 2, three decoded ones, five of a further question.
SPANS = [
    Span(start=0, stop=8, padded=8),
    Span(start=8, stop=13, padded=8),
    Span(start=13, stop=16),
    Span(start=16, stop=21, padded=8),
]
LAYOUTS = [
    Layout(tp=tp, pp=pp, cp=cp)
    for tp, pp, cp in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 3), (8, 2, 2)]
]


def number(layer, head, token):
    """What the only value of a row is."""
    return layer * 10_000 + head * 1000 + token


def rows_of(layout, rank, spans):
    """What a rank has: keys as `number` says, values half of it."""
    tokens = torch.from_numpy(tokens_of(spans, cp=layout.cp, rank=rank.cp))
    found = {}
    for layer in range(1, LAYERS + 1):
        if layout.pp > 1 and layer != rank.pp + 1:
            continue
        heads = heads_of(HEADS, tp=layout.tp, rank=rank.tp)
        keys = (
            torch.stack([number(layer, head, tokens) for head in heads])
            .double()[..., None]
            .expand(-1, -1, DIM)
        )
        found |= {f"keys.{layer}": keys, f"values.{layer}": keys / 2}
    return found


def ranks_of(layout):
    for tp, pp, cp in itertools.product(range(layout.tp), range(layout.pp), range(layout.cp)):
        yield Rank(tp=tp, pp=pp, cp=cp)


class File(dict):
    def get_tensor(self, name):
        return self[name]


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_any_layout_from_any_other(saved):
    spans = spans_for(SPANS, saved.cp)

    def open_file(rank):
        return contextlib.nullcontext(File(rows_of(saved, rank, spans)))

    for here in LAYOUTS:
        for rank in ranks_of(here):
            layers = [rank.pp + 1] if here.pp > 1 else [1, 2]
            wanted = Wanted(layout=here, rank=rank, layers=layers, kv_heads=HEADS)
            mine, rows = resharded(open_file, saved, spans, wanted)
            expected = rows_of(here, rank, mine)
            assert rows.keys() == expected.keys()
            assert all(torch.equal(rows[name], expected[name]) for name in rows)


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_rows_are_as_many_as_the_cache_counts_and_every_token_is_held_once(cp):
    held = []
    for rank in range(cp):
        cache = KVCache(KVPlace(cp=cp, cp_rank=rank))
        cache.spans = spans_for(SPANS, cp)
        tokens = tokens_of(cache.spans, cp=cp, rank=rank).tolist()
        assert tokens == sorted(tokens)
        assert [cache.rows_of(rank, end) for end in range(22)] == [
            sum(t < end for t in tokens) for end in range(22)
        ]
        held += tokens
    assert sorted(held) == list(range(21))


def test_files_that_do_not_fit_are_named():
    wanted = Wanted(layout=LAYOUTS[0], rank=Rank(), layers=[1, 2, 3], kv_heads=HEADS)
    rows = rows_of(LAYOUTS[0], Rank(), SPANS)
    with pytest.raises(KeyError, match=r"layers \[3\] are in no file"):
        resharded(lambda _rank: contextlib.nullcontext(File(rows)), LAYOUTS[0], SPANS, wanted)
    with pytest.raises(KeyError, match=r"keys.1 has the shape"):
        resharded(lambda _rank: contextlib.nullcontext(File(rows)), LAYOUTS[0], SPANS[:2], wanted)
