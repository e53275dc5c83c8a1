"""The cache grows in place and refuses to overflow."""

import pytest
import torch

from megatron_v2pe.inference.kv_cache import KVCache


def test_extends_layer_by_layer():
    cache = KVCache(4)
    first = torch.randn(3, 2, 8)
    keys, values = cache.extend(1, first, first + 1)
    assert torch.equal(keys, first)
    assert torch.equal(values, first + 1)
    step = torch.randn(1, 2, 8)
    keys, _ = cache.extend(1, step, step)
    assert torch.equal(keys, torch.cat([first, step]))
    other, _ = cache.extend(2, step, step)
    assert other.shape[0] == 1


def test_overflow_is_an_error():
    cache = KVCache(2)
    with pytest.raises(IndexError, match="3 tokens do not fit a cache made for 2"):
        cache.extend(1, torch.zeros(3, 1, 4), torch.zeros(3, 1, 4))


class Group:
    def __init__(self, rank):
        self.rank, self.size = lambda: rank, lambda: 2


def test_ranks_take_turns_with_new_tokens_and_drop_padding():
    prompt, steps = torch.randn(4, 1, 2), torch.randn(3, 1, 2)
    held = []
    for rank in range(2):
        cache = KVCache(6, prompt_rows=4 - rank, group=Group(rank))
        assert cache.is_empty(1)
        cache.add_prompt_share(1, prompt, prompt)
        assert not cache.is_empty(1)
        for step in steps:
            keys, _ = cache.add_turn(1, step[None], step[None])
        held.append(keys)
    assert torch.equal(held[0], torch.cat([prompt, steps[[0, 2]]]))
    assert torch.equal(held[1], torch.cat([prompt[:3], steps[[1]]]))
