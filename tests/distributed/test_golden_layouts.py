"""The release's recorded losses and gradients over several ranks, the tower whole on each (split: test_split_tower)."""

from pathlib import Path

import pytest

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.verification.golden.ranks import run_on_local_ranks
from megatron_v2pe.verification.golden.runner import select_groups

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.distributed


def check(**parallel):
    groups = select_groups(GOLDEN, name="model", model_only=True)
    rows = run_on_local_ranks(GOLDEN, groups, family="a", parallel=ParallelConfig(**parallel))
    assert [row for row in rows if row.status != "pass"] == []
    assert {row.quantity for row in rows} >= {"logits", "per_token_loss", "mean_loss", "grad_l2", "grad"}


def test_tensor_and_sequence_parallel():
    check(tp=2, sequence_parallel=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "parallel",
    [
        dict(tp=2),
        dict(pp=2),
        dict(cp=2),
        dict(tp=2, sequence_parallel=True, cp=2),
        dict(pp=2, cp=2),
    ],
    ids=["tp2", "pp2", "cp2", "tp2 sp cp2", "pp2 cp2"],
)
def test_every_axis_and_pairs(parallel):
    check(**parallel)
