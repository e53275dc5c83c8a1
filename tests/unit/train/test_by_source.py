"""Sums by data set against the same sums taken token by token, over the shards of a pack."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_v2pe.parallel.zigzag import shard_indices
from megatron_v2pe.train.by_source import SourceTotals, local_loss_sums, source_of_tokens, weights_and_tokens
from tests.support.packs import batch_of, layout_of

SOURCES = (3, 1, 3, 0)
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def pack():
    """Four documents of three data sets; of the four known ones, number 2 is absent."""
    layout = layout_of([[5, "1@2"], [11], [3, "2@4", 2], [6]], pad_to_multiple=8)
    return replace(batch_of(layout), sources=SOURCES)


def source_by_token(pack):
    bounds = pack.layout.cu_seqlens
    return np.array([SOURCES[np.searchsorted(bounds, i, side="right") - 1] for i in range(bounds[-1])])


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_shards_together_hold_the_sums_of_the_pack(pack, cp):
    losses = np.random.default_rng(0).random(len(pack.tokens)).astype(np.float32)
    wanted = np.zeros(4)
    for token, source in enumerate(source_by_token(pack)):
        wanted[source] += float(np.float32(losses[token]) * pack.loss_weights[token])
    found = torch.zeros(4, dtype=torch.float64)
    for cp_rank in range(cp):
        index = shard_indices(pack.layout.cu_seqlens, cp=cp, cp_rank=cp_rank)
        lengths = (np.diff(pack.layout.cu_seqlens) // cp).tolist()
        np.testing.assert_array_equal(source_of_tokens(pack, lengths), source_by_token(pack)[index])
        shard = [torch.from_numpy(values[index]).unsqueeze(0) for values in (losses, pack.loss_weights)]
        found += local_loss_sums(pack, *shard, local_lengths=lengths, num_sources=4)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found[2] == 0


def test_weights_and_tokens_are_those_of_the_documents(pack):
    weights, tokens = weights_and_tokens([pack, pack], num_sources=4)
    by_token = source_by_token(pack)
    for source in range(4):
        mine = pack.loss_weights[by_token == source]
        assert weights[source] == pytest.approx(2 * math.fsum(mine.tolist()))
    lengths = [document.num_tokens for document in pack.layout.documents]
    assert tokens.tolist() == [2 * lengths[3], 2 * lengths[1], 0, 2 * (lengths[0] + lengths[2])]


def test_absent_sources_have_no_number_and_bad_ones_none():
    totals = SourceTotals(
        loss_sums=(6.0, 0.0, math.nan, 0.0), weights=(2.0, 0.0, 6.0, 0.0), tokens=(9, 0, 8, 5)
    )
    assert totals.losses(NAMES) == {"a": 3.0, "c": None}
    assert totals.weight_shares(NAMES) == {"a": 0.25, "c": 0.75}
    assert totals.token_counts(NAMES) == {"a": 9, "c": 8, "d": 5}  # of d nothing is supervised
