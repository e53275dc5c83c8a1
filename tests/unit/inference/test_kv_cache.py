"""Blocks of rows: they grow in place, are shared by forks, and refuse to overflow."""

import pytest
import torch

from megatron_v2pe.inference.cache.kv_cache import KVBlock, KVCache, KVPlace, token_step
from megatron_v2pe.inference.cache.quantize import dequantize, quantize
from megatron_v2pe.inference.chunks import plan_chunks
from megatron_v2pe.parallel.zigzag import shard_indices
from tests.support.packs import sample


def rows_of(tokens, heads=2, dim=4):
    """Keys whose every number is the token's, so that they can be recognised."""
    return torch.tensor(tokens, dtype=torch.float32).view(-1, 1, 1).expand(-1, heads, dim).contiguous()


def held(cache, layer=1):
    """Tokens of which a cache has rows, in order."""
    return [int(x) for keys, _ in cache.parts(layer) for x in keys[0, :, 0]]


def filled(num_tokens, *, cp=1, rank=0, chunk_tokens=4, new_tokens=0):
    """A cache with a prompt in chunks and new tokens after it."""
    cache = KVCache(KVPlace(cp=cp, cp_rank=rank))
    chunks = plan_chunks(sample([num_tokens]), chunk_tokens=chunk_tokens, cp=cp)
    cache.reserve(chunks, new_tokens)
    for chunk in chunks:
        add_chunk(cache, chunk)
    for _ in range(new_tokens):
        add_token(cache)
    return cache


def add_chunk(cache, chunk):
    step = cache.note_chunk(chunk)
    index = shard_indices(
        torch.tensor([0, chunk.padded]).numpy(), cp=cache.place.cp, cp_rank=cache.place.cp_rank
    )
    tokens = (index + chunk.start).tolist()[: step.kept]
    cache.append(1, rows_of(tokens), rows_of(tokens))
    return step


def add_token(cache):
    step = token_step([cache])
    if step.owners[0] == cache.place.cp_rank:
        row = rows_of([cache.num_tokens - 1])
        cache.append(1, row, row)


def test_a_block_is_head_major_and_refuses_to_overflow():
    block = KVBlock(4)
    first = torch.randn(3, 2, 8)
    block.append(1, first, first + 1)
    ((keys, values),) = block.read(1, 3)
    assert torch.equal(keys, first.transpose(0, 1))
    assert torch.equal(values, first.transpose(0, 1) + 1)
    assert block.num_bytes == 2 * 2 * 4 * 8 * 4
    with pytest.raises(IndexError, match="5 rows do not fit a block made for 4"):
        block.append(1, torch.zeros(2, 2, 8), torch.zeros(2, 2, 8))


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_ranks_hold_every_token_once_and_blocks_are_exactly_full(cp):
    caches = [filled(11, cp=cp, rank=rank, new_tokens=5) for rank in range(cp)]
    assert sorted(token for cache in caches for token in held(cache)) == list(range(16))
    for rank, cache in enumerate(caches):
        assert len(held(cache)) == cache.rows_of(rank)
        (block, rows), *none = cache.blocks
        assert (rows, none) == (block.capacity, [])


@pytest.mark.parametrize("cp", [1, 2])
def test_a_fork_shares_a_prefix_and_grows_on_its_own(cp):
    for rank in range(cp):
        cache = filled(11, cp=cp, rank=rank, new_tokens=3)
        before = held(cache)
        for tokens in (1, 4, 6, 11, 12, 14):
            fork = cache.fork(tokens)
            assert held(fork) == [token for token in before if token < tokens]
            rest = plan_chunks(sample([tokens + 5]), chunk_tokens=4, cp=cp, start=tokens)
            fork.reserve(rest, 1)
            for chunk in rest:
                assert add_chunk(fork, chunk).past_rows[rank] == fork.rows_of(rank, chunk.start)
            add_token(fork)
            assert fork.num_tokens == tokens + 6
            assert held(cache) == before
            shared = {id(block) for block, _ in cache.blocks} & {id(block) for block, _ in fork.blocks}
            assert len(shared) == (1 if any(token < tokens for token in before) else 0)


def test_the_parent_may_grow_behind_a_fork():
    cache = filled(6, new_tokens=1)
    cache.reserve([], 2)
    fork = cache.fork(7)
    add_token(cache)
    assert held(fork) == list(range(7))
    assert held(cache) == list(range(8))


@pytest.mark.parametrize(("kind", "error"), [("int8", 1 / 127), ("fp8", 2**-3)])
def test_eight_bits_are_within_half_a_step_and_say_what_they_changed(kind, error):
    x = torch.randn(50, 3, 16) * torch.logspace(-6, 6, 50).view(50, 1, 1)
    values, scale = quantize(x, kind)
    back = dequantize(values, scale, torch.float32)
    assert bool(((back - x).abs() <= 0.5 * error * 1.02 * x.abs().amax(-1, keepdim=True)).all())
    block = KVBlock(50, kind)
    block.append(3, x, x)
    pieces = list(block.read(3, 50))
    assert torch.equal(torch.cat([keys for keys, _ in pieces], dim=1), back.transpose(0, 1))
    errors, squares = block.squares
    assert errors == pytest.approx(2 * float((back - x).square().sum()), rel=1e-4)
    assert 0 < errors / squares < error**2
    assert block.num_bytes == 2 * 3 * 50 * (16 + 2)


def test_zeros_stay_zeros():
    values, scale = quantize(torch.zeros(2, 8), "int8")
    assert torch.equal(dequantize(values, scale, torch.float32), torch.zeros(2, 8))
