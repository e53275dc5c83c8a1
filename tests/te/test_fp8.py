"""`model.fp8` through mcore's and Transformer Engine's own Python: which products are in FP8, and what they give.

Strategy: Transformer Engine 2.11 quantizes, gathers, keeps and multiplies as on a Hopper GPU; what it has compiled is
replaced by formulas (`fp8_kernels`), which refuse operands in the wrong order and rows or channels that are no
multiple of 16 (blocks: 128). Everything else is float32. Strictness: one rank against a native model whose linears
round by three lines of their own, 2e-3 of a gradient's norm (a rounding that falls to the other side moves an entry
by 6 %); other layouts against the same model without FP8, 0.2, at least 1e-3; recomputation to the bit. Kernels of a
GPU are not covered.
"""

import pytest
import torch

from tests.support.spawn import run_ranks
from tests.te.fp8_bodies import Case, after_an_update, formula, measured

pytestmark = pytest.mark.te

FP8 = {"fp8": "current"}
TWO_RANKS = {
    "cp2": dict(cp=2),
    "tp2": dict(tp=2),
    "tp2 sp": dict(tp=2, sequence_parallel=True),
}


def distance(found, wanted):
    """Of two steps' gradients, relative to their norm; the largest of all parameters that have one."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).norm() / wanted[name].norm())
        for name in wanted
        if wanted[name].norm() > 1e-3 * max(x.norm() for x in wanted.values())
    )


def test_one_rank_is_the_formula(te_python):
    ((ours, wanted),) = run_ranks(formula, 1, te_python, timeout=120, is_warm=False)
    assert ours["products"][0] == 24, "four linears of two layers, three products each"
    assert abs(ours["loss"] - wanted["loss"]) < 1e-4 * wanted["loss"]
    assert distance(ours["gradients"], wanted["gradients"]) < 2e-3


@pytest.fixture(scope="module")
def one_rank(te_python):
    cases = {
        "none": Case(),
        "fp8": Case(model=FP8),
        "selective": Case(model={**FP8, "recompute": "selective"}),
        "full": Case(model={**FP8, "recompute": "full"}),
        "chunks": Case(model={**FP8, "recompute": "selective", "mlp_chunks": 3}),
        "bias, none": Case(bias=True),
        "bias": Case(model=FP8, bias=True),
        "blocks, none": Case(wide=True),
        "blocks": Case(model={"fp8": "blockwise"}, wide=True),
        "blocks, full": Case(model={"fp8": "blockwise", "recompute": "full"}, wide=True),
        "adapters, none": Case(lora=dict(language_rank=4)),
        "adapters": Case(model=FP8, lora=dict(language_rank=4)),
    }
    return run_ranks(measured, 1, te_python, cases, timeout=200, is_warm=False)[0]


def test_nothing_is_in_fp8_without_it(one_rank):
    assert one_rank["none"]["products"][0] == 0


@pytest.mark.parametrize(
    ("case", "products"),
    [
        ("fp8", 24),
        ("selective", 24 + 4),
        ("full", 24 + 8),
        ("blocks", 24),
        ("adapters", 16),  # weights that are not trained have no gradient
    ],
)
def test_linears_of_the_decoder_are_in_fp8(one_rank, case, products):
    assert one_rank[case]["products"][0] == products


@pytest.mark.parametrize(
    ("case", "like"),
    [
        ("fp8", "none"),
        ("bias", "bias, none"),
        ("blocks", "blocks, none"),
        ("adapters", "adapters, none"),
        ("chunks", "none"),
    ],
)
def test_it_is_near_what_it_rounds(one_rank, case, like):
    found, wanted = one_rank[case], one_rank[like]
    assert abs(found["loss"] - wanted["loss"]) < 0.02 * wanted["loss"]
    assert 1e-3 < distance(found["gradients"], wanted["gradients"]) < 0.2


@pytest.mark.parametrize(
    ("case", "like"), [("selective", "fp8"), ("full", "fp8"), ("blocks, full", "blocks")]
)
def test_what_runs_again_runs_in_fp8(one_rank, case, like):
    found, wanted = one_rank[case], one_rank[like]
    assert found["loss"] == wanted["loss"]
    differing = [
        name
        for name in wanted["gradients"]
        if not torch.equal(found["gradients"][name], wanted["gradients"][name])
    ]
    assert differing == []


def test_a_step_quantizes_changed_weights_again(te_python):
    (losses,) = run_ranks(after_an_update, 1, te_python, timeout=120, is_warm=False)
    assert losses["after"] == losses["fresh"]
    assert losses["after"][0] == losses["after"][1], "the copies of a step serve all its micro batches"
    assert abs(losses["stale"] - losses["after"][0]) > 1e-3 * losses["after"][0], (
        "the comparison would see old copies"
    )


@pytest.mark.distributed
def test_two_ranks(te_python):
    cases = {
        name: Case(layout=layout, model=model)
        for kind, model in (("none", {}), ("fp8", FP8), ("again", {**FP8, "recompute": "full"}))
        for name, layout in ((f"{layout}, {kind}", fields) for layout, fields in TWO_RANKS.items())
    }
    for rank in run_ranks(measured, 2, te_python, cases, timeout=300, is_warm=False):
        for layout in TWO_RANKS:
            found, wanted, again = (rank[f"{layout}, {kind}"] for kind in ("fp8", "none", "again"))
            assert found["products"][0] == 24, layout
            assert 1e-3 < distance(found["gradients"], wanted["gradients"]) < 0.2, layout
            assert distance(again["gradients"], found["gradients"]) == 0, layout
