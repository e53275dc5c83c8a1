"""Packing: whatever the lengths, nothing is lost, nothing exceeds a budget, and packs are full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.data.plan.packing import best_fit_packs, pack_fill
from megatron_v2pe.data.plan.release_packing import GreedySample, ReleaseGreedyPacker

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 12)), max_size=60)


@given(samples=SAMPLES, window=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_every_sample_is_in_exactly_one_pack_within_both_budgets(samples, window):
    tokens = np.array([sample[0] for sample in samples], dtype=np.int64)
    tiles = np.array([sample[1] for sample in samples], dtype=np.int64)
    packs = best_fit_packs(tokens, tiles, max_tokens=100, max_tiles=12, window=window)
    assert sorted(place for pack in packs for place in pack) == list(range(len(samples)))
    for pack in packs:
        assert pack == sorted(pack)
        assert tokens[pack].sum() <= 100
        assert tiles[pack].sum() <= 12


@given(samples=SAMPLES)
@settings(max_examples=100, deadline=None)
def test_no_two_packs_could_be_one(samples):
    """Within a window best fit opens a pack only if none had room for the sample."""
    tokens = np.array([sample[0] for sample in samples], dtype=np.int64)
    packs = best_fit_packs(tokens, np.zeros_like(tokens), max_tokens=100, max_tiles=1)
    loads = sorted(int(tokens[pack].sum()) for pack in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


def test_a_sample_beyond_a_budget_is_refused():
    with pytest.raises(ValueError, match="exceeds the budget of 100 tokens and 12 tiles"):
        best_fit_packs(np.array([101]), np.array([0]), max_tokens=100, max_tiles=12)
    with pytest.raises(ValueError, match="exceeds the budget"):
        best_fit_packs(np.array([1]), np.array([13]), max_tokens=100, max_tiles=12)


@pytest.mark.parametrize("max_tokens", [32768, 262144])
def test_packs_of_a_long_tailed_mixture_are_full(max_tokens):
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.lognormal(8.0, 1.2, 30000), 32768).astype(np.int64) + 1
    tokens = np.minimum(tokens, 32768)
    packs = best_fit_packs(tokens, np.zeros_like(tokens), max_tokens=max_tokens, max_tiles=1)
    assert pack_fill(packs[:-1], tokens, max_tokens=max_tokens) > 0.995


@given(samples=SAMPLES, buffer_size=st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_the_releases_packer_keeps_its_budgets_and_drops_only_what_has_too_many_tiles(samples, buffer_size):
    packer = ReleaseGreedyPacker(max_tiles=8, max_tokens=100, max_buffer_size=buffer_size)
    arrivals = [
        GreedySample(sample_id=number, num_tokens=tokens, num_tiles=max(tiles, 1))
        for number, (tokens, tiles) in enumerate(samples)
    ]
    packs = [pack for sample in arrivals for pack in packer.add(sample)] + packer.flush()
    packed = sorted(part.sample.sample_id for pack in packs for part in pack.members)
    assert packed == [sample.sample_id for sample in arrivals if sample.num_tiles <= 8]
    assert all(pack.num_tokens <= 100 and pack.num_tiles <= 8 for pack in packs)
