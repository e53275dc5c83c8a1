"""Counts of a global batch against the same numbers taken token by token."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.arch.flops import vision_flops
from megatron_v2pe.config.arch.pyramid import PyramidArchitecture
from megatron_v2pe.train.metrics.batch_stats import count_batches
from megatron_v2pe.v2pe.positions import position_units
from tests.support import tiny


@pytest.fixture
def alone():
    """This process as the only rank of a world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    yield SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), groups=SimpleNamespace(dp=group))
    dist.destroy_process_group()


def test_counts_are_those_of_the_tokens(filled, alone):
    arch = read_architecture(tiny.GOLDEN_HF)
    batches = next(iter(filled.loader(filled.config(batch=2))))
    row = {"data_s": 0.25, "comm_wait_s": 0.5}
    stats = count_batches(batches, arch, ranks=alone, row=row)
    counts = SimpleNamespace(**stats.numbers)
    documents = [document for batch in batches for document in batch.layout.documents]
    assert counts.tokens == sum(document.num_tokens for document in documents)
    assert counts.supervised_tokens == sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    padded = sum(len(batch.tokens) for batch in batches)
    assert counts.padding_share == pytest.approx(1 - counts.tokens / padded)
    assert (counts.packs, counts.samples) == (2, len(documents))
    strides = np.concatenate([document.strides for document in documents])
    assert (counts.stride_min, counts.stride_max) == (strides.min(), strides.max())
    assert counts.stride_mean == pytest.approx(strides.mean())
    last = max(
        int(position_units(batch.layout)[start + document.num_tokens - 1]) // document.tokens_per_tile
        for batch in batches
        for start, document in zip(batch.layout.cu_seqlens, batch.layout.documents, strict=False)
    )
    assert counts.max_position == last
    assert counts.tiles == counts.max_tiles_per_rank == sum(len(batch.tiles) for batch in batches)
    assert counts.imbalance == 1
    assert stats.flops < stats.flops_full_attention
    assert stats.by_rank["data_s"] == (0.25,)
    assert stats.by_rank["comm_wait_s"] == (0.5,)


def test_the_share_of_each_branch_of_a_pyramid(filled, alone):
    """They are shares of the step: with projector and decoder they make 1, and follow the branches' sizes."""
    plain = read_architecture(tiny.GOLDEN_HF)
    branch = replace(plain.vision, hidden_size=32, num_heads=2, ffn_size=128, image_size=168)
    pyramid = PyramidArchitecture(branches=(branch,), num_interactions=2, heads=4)
    batches = next(iter(filled.loader(filled.config(batch=2))))
    row = {"data_s": 0.25, "comm_wait_s": 0.5}
    without = count_batches(batches, plain, ranks=alone, row=row)
    assert "flops_share_by_branch" not in without.numbers
    stats = count_batches(batches, replace(plain, pyramid=pyramid), ranks=alone, row=row)
    shares = stats.numbers["flops_share_by_branch"]
    assert set(shares) == {"large", "branch_1", "interactions"}
    added = stats.flops - without.flops
    assert shares["branch_1"] + shares["interactions"] == pytest.approx(added / stats.flops)
    tiles = stats.numbers["tiles"]
    tower = vision_flops(plain, tiles) - vision_flops(
        replace(plain, vision=replace(plain.vision, num_layers=0)), tiles
    )
    assert shares["large"] == pytest.approx(tower / stats.flops)
