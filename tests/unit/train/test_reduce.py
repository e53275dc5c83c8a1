"""Numbers under their names over the ranks of a world of one; layouts are in tests/e2e/test_train.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.train.reduce import gather_by_name, sum_by_name
from tests.support.spawn import run_ranks

CPU = torch.device("cpu")


def both(rank, world_size):
    sums = sum_by_name(
        {"a": float(rank + 1), "b": torch.tensor([[rank, 1]]), "none": torch.zeros(0)}, device=CPU
    )
    ranks = SimpleNamespace(rank=rank, world_size=world_size, device=CPU)
    return sums, gather_by_name({"wait": rank / 2, "memory": math.nan if rank else 1.0}, ranks=ranks)


@pytest.mark.distributed
def test_every_rank_gets_the_sums_and_every_ranks_numbers():
    for sums, table in run_ranks(both, 2):
        assert float(sums["a"]) == 3.0
        assert sums["b"].tolist() == [[1.0, 2.0]]
        assert sums["none"].tolist() == []
        assert table["wait"] == (0.0, 0.5)
        assert table["memory"][0] == 1.0
        assert math.isnan(table["memory"][1])


def test_large_whole_numbers_add_up_exactly():
    with ensure_process_group():
        assert int(sum_by_name({"digest": 2**53 - 1}, device=CPU)["digest"]) == 2**53 - 1
