"""Routing over two real ranks equals direct indexing of all features, forward and backward."""

import pytest
import torch

from megatron_v2pe.batch.packed_batch import tile_share
from megatron_v2pe.parallel.topology import ParallelPlan
from tests.support.packs import TOKENS_PER_TILE, layout_of
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed

HIDDEN = 3
DOCUMENTS = {
    "odd number of tiles": [[3, "2@1", 2], [1, "1@4", 5, "2@2", 1]],
    "one tile, a rank without": [[2, "1@2", 9]],
    "text only": [[5], [11]],
}
PLANS = [ParallelPlan(cp=2), ParallelPlan(tp=2, sequence_parallel=True)]
CASES = [(plan, name) for plan in PLANS for name in DOCUMENTS]


def features_of(layout):
    """Features of the whole pack, equal on every rank."""
    shape = (layout.num_tiles * TOKENS_PER_TILE, HIDDEN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weights_of(layout):
    """One weight for each feature row and channel: the gradient that every row must get."""
    shape = (layout.num_tiles * TOKENS_PER_TILE, HIDDEN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def route_case(rank, plan, name):
    import torch.distributed as dist

    from megatron_v2pe.parallel.feature_router import FeatureRouter, feature_route, owned_rows
    from megatron_v2pe.parallel.zigzag import shard_ranges_of_ranks

    layout = layout_of(DOCUMENTS[name], pad_to_multiple=plan.pad_to_multiple)
    shards = shard_ranges_of_ranks(layout.cu_seqlens, cp=plan.cp)
    route = feature_route(layout, shards, plan=plan, tile_rank=rank, device=torch.device("cpu"))
    start, stop = tile_share(layout.num_tiles, 2, rank)
    mine = slice(start * TOKENS_PER_TILE, stop * TOKENS_PER_TILE)
    local = features_of(layout)[mine].requires_grad_()
    rows = FeatureRouter(dist.group.WORLD)(local, route)
    _, wanted = owned_rows(layout, shards, plan=plan)[rank]
    assert torch.equal(rows, features_of(layout)[wanted])
    assert rows.requires_grad  # also with zero rows, or the backward collective would miss this rank
    (rows * weights_of(layout)[wanted]).sum().backward()
    assert torch.equal(local.grad, weights_of(layout)[mine])
    return len(rows)


def all_cases(rank, world_size):
    return [route_case(rank, *case) for case in CASES]


def test_rows_and_gradients_equal_direct_indexing():
    first, second = run_ranks(all_cases, 2, timeout=90)
    for (plan, name), *counts in zip(CASES, first, second, strict=True):
        layout = layout_of(DOCUMENTS[name], pad_to_multiple=plan.pad_to_multiple)
        assert sum(counts) == layout.num_tiles * TOKENS_PER_TILE


def test_a_group_of_one_needs_no_communication():
    from megatron_v2pe.parallel.feature_router import FeatureRouter, feature_route
    from megatron_v2pe.parallel.zigzag import shard_ranges_of_ranks

    class Alone:
        def size(self):
            return 1

    layout = layout_of(DOCUMENTS["odd number of tiles"], pad_to_multiple=1)
    shards = shard_ranges_of_ranks(layout.cu_seqlens, cp=1)
    route = feature_route(layout, shards, plan=ParallelPlan(), tile_rank=0, device=torch.device("cpu"))
    features = features_of(layout)
    assert torch.equal(FeatureRouter(Alone())(features, route), features)
