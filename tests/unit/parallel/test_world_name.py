"""Ranks agree on a new name whatever earlier worlds, also ones that died half-joined, left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_v2pe.parallel.world_name import agree_on_name

TIMEOUT = timedelta(seconds=20)


def join(store, ranks, world_size, timeout=TIMEOUT):
    """Names that some ranks get, each in a thread of its own."""
    names = {}

    def body(rank):
        names[rank] = agree_on_name(store, rank=rank, world_size=world_size, timeout=timeout)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return names


def test_every_world_has_one_name_of_its_own():
    store = dist.HashStore()
    worlds = [join(store, order, 3) for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    assert all(len(set(names.values())) == 1 and len(names) == 3 for names in worlds)
    assert len({names[0] for names in worlds}) == 3


def test_arrivals_of_ranks_that_died_change_nothing():
    store = dist.HashStore()
    first = join(store, (0, 1), 2)
    store.add("world_arrivals", 1)  # a rank that died before it was answered
    second = join(store, (1, 0), 2)
    assert second[0] == second[1] != first[0]


def test_a_rank_that_never_comes_is_an_error():
    with pytest.raises(TimeoutError, match="0 of 1 other ranks"):
        agree_on_name(dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=0.1))
