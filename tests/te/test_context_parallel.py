"""Transformer Engine 2.11's own context parallel code, through our adapter, our shards, boundaries and padding.

Strategy: two gloo ranks run the real Python of Transformer Engine from `DotProductAttention.forward` down (choice of
back end, detection of padding, ring or all-to-all, merging, backward) on reference kernels; each rank's rows must
equal full float64 attention. Strictness: relative 2e-6 of each tensor, float32. The kernels are not tested here.
"""

import pytest

from tests.support.spawn import run_ranks
from tests.te.bodies import attention_cases

pytestmark = [pytest.mark.te, pytest.mark.distributed]

TOLERANCE, WRONG = 2e-6, 0.05
PACKS = {  # documents are padded to multiples of 4 at cp 2
    "last padded": [[32], [61]],
    "only one, padded": [[61]],
    "first padded": [[61], [32]],
    "no padding": [[32], [64]],
    "images": [[3, "2@1", 9], [20, "1@3"], [33]],
}
OURS = [(name, comm) for name in PACKS for comm in ("p2p", "a2a")]
# What mcore's own parameters would say: where documents really end, beside where they are padded to.
MCORES = [
    ("last padded", "p2p"),
    ("only one, padded", "p2p"),
    ("first padded", "p2p"),
    ("last padded", "a2a"),
]


@pytest.fixture(scope="module")
def two_ranks(te_python):
    """Largest error over ranks and tensors by (pack, comm, boundaries are the real ones); refusals by rank."""
    keys = [*((*case, False) for case in OURS), *((*case, True) for case in MCORES)]
    cases = [(PACKS[pack], comm, real) for pack, comm, real in keys]
    by_rank = run_ranks(attention_cases, 2, te_python, cases, timeout=240, is_warm=False)
    worst = {key: max(max(errors[i]) for errors, _ in by_rank) for i, key in enumerate(keys)}
    return worst, [said for _, said in by_rank]


@pytest.fixture(scope="module")
def worst(two_ranks):
    return two_ranks[0]


@pytest.mark.parametrize(("pack", "comm"), OURS)
def test_our_calls_equal_full_attention(worst, pack, comm):
    assert worst[pack, comm, False] < TOLERANCE


@pytest.mark.parametrize("pack", ["last padded", "only one, padded"])
def test_real_boundaries_would_be_silently_wrong(worst, pack):
    """The reason why padding counts as tokens: only the last document padded is not seen as padding."""
    assert worst[pack, "p2p", True] > WRONG


@pytest.mark.parametrize(("pack", "comm"), [("first padded", "p2p"), ("last padded", "a2a")])
def test_other_real_boundaries_would_be_right(worst, pack, comm):
    """So it is the detection that is wrong, and not this test's reference kernels."""
    assert worst[pack, comm, True] < TOLERANCE


def test_what_we_refuse_is_refused_there(two_ranks):
    for said in two_ranks[1]:
        assert "No dot product attention backend" in said["all_gather"] or "padding" in said["all_gather"]
        assert "thd format is not supported with hierarchical CP" in said["a2a+p2p"]


@pytest.mark.slow
def test_four_ranks(te_python):
    documents = [[3, "4@1", 90], [20, "2@3"], [61]]
    for errors, _ in run_ranks(
        attention_cases, 4, te_python, [(documents, "p2p", False)], timeout=240, is_warm=False
    ):
        assert max(errors[0]) < TOLERANCE
