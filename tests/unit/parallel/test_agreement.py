"""Ranks that were not started alike are refused on all ranks, by one message that names who differs in what.

Strategy: ranks as threads over a store in memory, which is what the launcher's store is to them.
"""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.agreement import RankFacts, describe_differences, require_equal_facts

USUAL = {"optim.lr": "0.001", "torch version": "2.13.0", "data set a annotation content": "90 bytes"}


def compared(*tables):
    """What each rank raises, "" for nothing."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    messages = [""] * len(tables)

    def body(rank):
        try:
            require_equal_facts(store, tables[rank], rank=rank, world_size=len(tables))
        except ConfigError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(len(tables))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return messages


def test_equal_ranks_continue():
    assert compared(USUAL, dict(reversed(USUAL.items())), USUAL) == ["", "", ""]


@pytest.mark.parametrize("name", USUAL)
def test_every_rank_names_the_one_that_differs(name):
    messages = compared(USUAL, {**USUAL, name: "other"}, USUAL)
    assert len(set(messages)) == 1
    assert f": {name} is other (rank 0 on " in messages[0]
    assert f"{USUAL[name]})" in messages[0]
    assert "rank 1 on " in messages[0]


def test_the_majority_is_right_also_against_rank_0():
    tables = [RankFacts(rank=rank, host=f"node{rank}", facts=USUAL) for rank in range(4)]
    tables[0] = RankFacts(rank=0, host="node0", facts={**USUAL, "optim.lr": "0.1"})
    message = describe_differences(tables)
    assert "alike: rank 0 on node0: optim.lr is 0.1 (rank 1 on node1: 0.001). Start" in message


def test_many_ranks_and_many_keys_stay_one_screen():
    usual = {f"key{number}": "x" * 500 for number in range(50)}
    other = {f"key{number}": "y" * 500 for number in range(50)}
    tables = [RankFacts(rank=rank, host="node", facts=usual if rank < 600 else other) for rank in range(1000)]
    message = describe_differences(tables)
    assert "and 396 more: key0 is yyy" in message
    assert "and 42 more differ" in message
    assert len(message) < 3000


def test_a_fact_that_only_one_rank_has_is_named():
    assert "environment NVTE_X is 1 (rank 0 on" in compared(USUAL, {**USUAL, "environment NVTE_X": "1"})[0]
    assert "torch version is not there" in compared(USUAL, USUAL, {"optim.lr": "0.001"})[0]
