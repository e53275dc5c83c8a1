"""Sums and gathers of shards over gloo, on three ranks, against what the numbers must be."""

import pytest
import torch
import torch.distributed as dist

from megatron_v2pe.parallel.runtime import shard_exchange
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
RANKS, SHARD = 3, 10


def exchange(rank, world_size):
    """Buffers of a rank after each exchange; pieces of 4 elements make three of a shard, the last one short."""
    group, found = dist.group.WORLD, []
    for pieces in (shard_exchange.PIECE_ELEMENTS, 4, SHARD):
        shard_exchange.PIECE_ELEMENTS = pieces
        buffer = torch.arange(world_size * SHARD) * 10**rank
        shard_exchange.sum_shards(buffer, group)
        summed = buffer.clone()
        shard_exchange.gather_shards(buffer, group)
        found.append((summed.tolist(), buffer.tolist()))
    return found


def test_each_rank_sums_its_shard_and_all_gather_the_sums():
    total = [number * 111 for number in range(RANKS * SHARD)]
    for rank, found in enumerate(run_ranks(exchange, RANKS)):
        own = range(rank * SHARD, (rank + 1) * SHARD)
        for summed, gathered in found:
            assert summed == [total[n] if n in own else n * 10**rank for n in range(RANKS * SHARD)]
            assert gathered == total
