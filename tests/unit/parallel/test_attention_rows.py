"""Attention of rows to a head-major cache: against plain float64 attention, in parts, and by both ways over ranks."""

import itertools

import numpy as np
import pytest
import torch

from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace
from megatron_v2pe.inference.chunks import plan_chunks
from megatron_v2pe.parallel.attention import cached
from megatron_v2pe.parallel.attention.cached import cached_attention, passes_queries
from megatron_v2pe.parallel.attention.rows import Partial, attend_rows, fold, unfold
from megatron_v2pe.parallel.zigzag import shard_indices
from tests.support.packs import sample
from tests.support.spawn import run_ranks

SCALE = 0.25


def plain(rows, keys, values):
    """float64 softmax attention and log-sum-exp."""
    scores = SCALE * rows.double() @ keys.double().transpose(1, 2)
    return scores.softmax(-1) @ values.double(), scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)],  # machine precision of each
)
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_few_and_many_rows(dtype, tolerance, count):
    generator = torch.Generator().manual_seed(count)
    rows, keys, values = (torch.randn(2, n, 16, generator=generator).to(dtype) for n in (count, 70, 70))
    part = attend_rows(rows, keys, values, scale=SCALE)
    out, lse = plain(rows, keys, values)
    torch.testing.assert_close(part.out.double(), out, rtol=0, atol=tolerance)
    torch.testing.assert_close(part.lse.double(), lse, rtol=0, atol=max(tolerance, 1e-6 * tolerance))
    assert part.out.dtype == torch.promote_types(dtype, torch.float32)


def test_parts_in_any_order_make_the_whole_and_nothing_changes_nothing():
    rows, keys, values = (torch.randn(3, n, 8, dtype=torch.float64) for n in (4, 30, 30))
    out, lse = plain(rows, keys, values)
    for bounds in ([0, 10, 30], [0, 1, 29, 30], [0, 0, 30]):
        total = Partial.empty(rows)
        for low, high in reversed(list(itertools.pairwise(bounds))):
            part = Partial.empty(rows)
            if high > low:
                part = attend_rows(rows, keys[:, low:high], values[:, low:high], scale=SCALE)
            total.add(part)
        torch.testing.assert_close(total.out, out, rtol=0, atol=1e-13)
        torch.testing.assert_close(total.lse, lse, rtol=0, atol=1e-13)
    nothing = Partial.empty(rows)
    nothing.add(Partial.empty(rows))
    assert bool((nothing.out == 0).all())
    assert bool((nothing.lse == float("-inf")).all())


def test_fold_puts_the_query_heads_of_a_key_head_together():
    query = torch.arange(2 * 6).view(2, 6, 1)  # token 0: heads 0..5, token 1: 6..11
    rows = fold(query, 2)
    assert rows.squeeze(-1).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert torch.equal(unfold(rows, 2), query)


def test_the_shorter_way_is_chosen():
    """4 query and 2 key heads of 8 channels in float32: a query moves 4 * (8 + 9) * 4 bytes, a key 2 * 2 * 8 * 4."""
    query, key = torch.zeros(10, 4, 8), torch.zeros(10, 2, 8)
    assert not passes_queries(query, key, past_rows=[21, 20])
    assert passes_queries(query, key, past_rows=[22, 0])


def over_ranks(rank, world_size, ways):
    """A document in ragged chunks, the past by queries, by keys, or by the formula."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(60, 4, 8, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(60, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    group = torch.distributed.group.WORLD if world_size > 1 else None
    found = {}
    for way in ways:
        chosen = cached.passes_queries
        if way != "formula":
            cached.passes_queries = lambda *_args, way=way, **_kwargs: way == "queries"
        cache = KVCache(KVPlace(cp=world_size, cp_rank=rank, group=group))
        chunks = plan_chunks(sample([59]), chunk_tokens=13, cp=world_size)
        whole = torch.zeros(60, 4 * 8, dtype=torch.float64)
        for chunk in chunks:
            cache.reserve([chunk], 0)
            index = shard_indices(np.array([0, chunk.padded]), cp=world_size, cp_rank=rank) + chunk.start
            held = torch.from_numpy(np.minimum(index, 59))
            step = cache.note_chunk(chunk)
            out = cached_attention(
                query[held], key[held], value[held], step=step, layer_number=1, scale=SCALE
            )
            whole[held[: step.kept]] = out[: step.kept]
        if group is not None:
            torch.distributed.all_reduce(whole)
        found[way] = whole
        cached.passes_queries = chosen
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_queries_or_keys_travel_and_the_result_is_that_of_one_pass(world_size):
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(60, 4, 8, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(60, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = SCALE * torch.einsum("thd,shd->hts", query, key.repeat_interleave(2, 1))
    scores = scores.masked_fill(~torch.ones(60, 60, dtype=torch.bool).tril(), float("-inf"))
    expected = torch.einsum("hts,shd->thd", scores.softmax(-1), value.repeat_interleave(2, 1)).flatten(1)[:59]
    for found in run_ranks(over_ranks, world_size, ("queries", "keys", "formula"), timeout=60):
        for way, out in found.items():
            error = float((out[:59] - expected).abs().max())
            assert error < 1e-13, (way, error)
