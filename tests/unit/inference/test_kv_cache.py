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
