"""Cutting a pack, all ranks simulated in one process: every field by the same index, features to their tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_v2pe.batch.packed_batch import tile_share
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.feature_router import feature_route, owned_rows
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.shards import Sharding
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.parallel.zigzag import range_indices
from tests.support.packs import IMAGE_TOKEN, TOKENS_PER_TILE, batch_of, feature_rows, layout_of, units_of

DOCUMENTS = {
    "images spread": [[3, "2@1", 2], [1, "1@4", 5, "3@2", 1], [6]],
    "images in one document": [[6], [2, "4@3", 1, "1@1"], [3]],
    "one image": [[2, "1@2", 9], [4]],
    "text only": [[5], [11], [2]],
}
PLANS = [
    ParallelPlan(),
    ParallelPlan(cp=2),
    ParallelPlan(tp=2),
    ParallelPlan(tp=2, sequence_parallel=True),
    ParallelPlan(tp=2, cp=2),
    ParallelPlan(tp=2, cp=2, sequence_parallel=True),
    ParallelPlan(tp=4, cp=3, sequence_parallel=True),
]
# A document's linears cost little, or nearly all: other documents lie on some of the ranks.
SHARDINGS = {
    "zigzag": Sharding(),
    "by document": Sharding(mode="by_document", linear_tokens=1),
    "by document, even": Sharding(mode="by_document", linear_tokens=10**6),
}
NORM = PixelNorm((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
CPU = torch.device("cpu")


def name_of(plan):
    return f"tp{plan.tp}cp{plan.cp}{'sp' if plan.sequence_parallel else ''}"


def context_of(plan, tile_rank=0, *, first_stage=True):
    """A context with the fields of `Ranks` that cutting reads."""
    slices = plan.tp if plan.sequence_parallel else 1
    ranks = SimpleNamespace(
        cp_rank=tile_rank // slices,
        tp_rank=tile_rank % slices,
        tile_rank=tile_rank,
        is_first_stage=first_stage,
        device=CPU,
    )
    return ParallelContext(plan, ranks)


def cut(layout, plan, tile_rank=0, *, first_stage=True, tile_range="mine", dtype=torch.float32, **options):
    share = tile_share(layout.num_tiles, plan.tile_ranks, tile_rank) if tile_range == "mine" else tile_range
    context = context_of(plan, tile_rank, first_stage=first_stage)
    options = {"norm": NORM, **options}
    return BatchSharder(context=context, dtype=dtype, **options).shard(batch_of(layout, tile_range=share))


@pytest.fixture(params=SHARDINGS)
def sharding(request):
    return SHARDINGS[request.param]


@pytest.fixture(params=DOCUMENTS)
def documents(request):
    return DOCUMENTS[request.param]


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_one_index_cuts_every_field(documents, plan, sharding):
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple)
    whole, units = batch_of(layout), units_of(layout)
    slices = plan.tile_ranks // plan.cp
    for cp_rank in range(plan.cp):
        shards = sharding.shards(layout.cu_seqlens, cp=plan.cp)
        index = range_indices(shards.ranges[cp_rank])
        local = cut(layout, plan, cp_rank * slices, sharding=sharding)
        assert local.document_holders == shards.holders
        assert sum(local.local_lengths) == len(index)
        assert local.tokens.tolist() == [whole.tokens[index].tolist()]
        assert local.labels.tolist() == [whole.labels[index].tolist()]
        assert local.loss_weights.tolist() == [whole.loss_weights[index].tolist()]
        assert local.position_units.tolist() == units[index].tolist()
        assert local.cu_seqlens.tolist() == layout.cu_seqlens.tolist()
        assert local.cu_seqlens.dtype == torch.int32
        assert local.max_seqlen == int(np.diff(layout.cu_seqlens).max())
        assert local.rope_length == layout.rope_length


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_every_feature_arrives_at_its_token(documents, plan, sharding):
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple)
    num_ranks, slices = plan.tile_ranks, plan.tile_ranks // plan.cp
    shards = sharding.shards(layout.cu_seqlens, cp=plan.cp).ranges
    routes = [
        feature_route(layout, shards, plan=plan, tile_rank=rank, device=CPU) for rank in range(num_ranks)
    ]
    starts = [tile_share(layout.num_tiles, num_ranks, rank)[0] * TOKENS_PER_TILE for rank in range(num_ranks)]
    sent = [
        (route.send_rows + start).split(route.send_splits)
        for route, start in zip(routes, starts, strict=True)
    ]
    wanted = feature_rows(layout)
    delivered = 0
    for receiver, route in enumerate(routes):
        received = torch.cat([sent[sender][receiver] for sender in range(num_ranks)])
        assert route.receive_splits == tuple(len(sent[sender][receiver]) for sender in range(num_ranks))
        cp_rank, tp_slice = divmod(receiver, slices)
        index = range_indices(shards[cp_rank])
        length = len(index) // slices
        local = wanted[index[tp_slice * length : (tp_slice + 1) * length]]
        assert route.slots.tolist() == np.flatnonzero(local >= 0).tolist()
        assert received.tolist() == local[local >= 0].tolist()
        delivered += len(received)
    assert delivered == layout.num_tiles * TOKENS_PER_TILE


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_slots_are_the_image_tokens_of_the_shard(documents, plan, sharding):
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple)
    slices = plan.tile_ranks // plan.cp
    owned = owned_rows(layout, sharding.shards(layout.cu_seqlens, cp=plan.cp).ranges, plan=plan)
    assert len(owned) == plan.tile_ranks
    for tile_rank, (slots, _) in enumerate(owned):
        tokens = cut(layout, plan, tile_rank, sharding=sharding).tokens.squeeze(0)
        mine = tokens.chunk(slices)[tile_rank % slices]
        assert slots.tolist() == (mine == IMAGE_TOKEN).nonzero().squeeze(1).tolist()


def test_pixels_are_this_ranks_tiles_normalised():
    plan = ParallelPlan(cp=2)
    layout = layout_of(DOCUMENTS["images spread"], pad_to_multiple=plan.pad_to_multiple)
    pixels = cut(layout, plan, 1, dtype=torch.float64).pixels
    assert pixels.shape == (3, 3, 2, 2)
    assert pixels.dtype == torch.float64
    expected = [
        [(tile / 255 - mean) / std for mean, std in zip(NORM.mean, NORM.std, strict=True)]
        for tile in (3, 4, 5)
    ]
    torch.testing.assert_close(
        pixels[:, :, 0, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_later_stages_get_neither_pixels_nor_route():
    plan = ParallelPlan(pp=2)
    layout = layout_of(DOCUMENTS["images spread"], pad_to_multiple=1)
    local = cut(layout, plan, first_stage=False, tile_range=(0, 0))
    assert local.pixels is None
    assert local.route is None
    assert len(local.position_units) == layout.num_tokens


def test_ranks_without_tiles_still_have_a_route():
    plan = ParallelPlan(tp=4, cp=2, sequence_parallel=True)
    layout = layout_of(DOCUMENTS["one image"], pad_to_multiple=plan.pad_to_multiple)
    local = cut(layout, plan, 7)
    assert local.pixels.shape == (0, 3, 2, 2)
    assert sum(local.route.send_splits) == 0
    assert len(local.route.send_splits) == len(local.route.receive_splits) == 8


def test_pixels_of_another_ranks_tiles_are_refused():
    plan = ParallelPlan(cp=2)
    layout = layout_of(DOCUMENTS["images spread"], pad_to_multiple=plan.pad_to_multiple)
    with pytest.raises(ValueError, match=r"tiles \(0, 6\) were decoded, but rank 1 of 2 encodes \(3, 6\)"):
        cut(layout, plan, 1, tile_range=(0, 6))


def test_uint8_tiles_need_a_normalisation():
    layout = layout_of(DOCUMENTS["images spread"], pad_to_multiple=1)
    with pytest.raises(ValueError, match="uint8 tiles, but this BatchSharder has no PixelNorm"):
        cut(layout, ParallelPlan(), norm=None)


def test_ranges_are_computed_once_for_each_rank(monkeypatch):
    from megatron_v2pe.parallel import zigzag

    asked, right = [], zigzag.shard_ranges

    def counted(cu_seqlens, *, cp, cp_rank):
        asked.append(cp_rank)
        return right(cu_seqlens, cp=cp, cp_rank=cp_rank)

    monkeypatch.setattr(zigzag, "shard_ranges", counted)
    plan = ParallelPlan(tp=2, cp=2, sequence_parallel=True)
    cut(layout_of(DOCUMENTS["images spread"], pad_to_multiple=plan.pad_to_multiple), plan, 3)
    assert asked == [0, 1]


@pytest.mark.parametrize("plan", PLANS, ids=name_of)
def test_stages_know_the_rows_of_their_own_shard(documents, plan, sharding):
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple)
    slices = plan.tile_ranks // plan.cp
    for cp_rank in range(plan.cp):
        sharder = BatchSharder(
            context=context_of(plan, cp_rank * slices), dtype=torch.float32, norm=NORM, sharding=sharding
        )
        local = cut(layout, plan, cp_rank * slices, sharding=sharding)
        assert sharder.rows(batch_of(layout)) == local.tokens.shape[1] // slices
