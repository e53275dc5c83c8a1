"""`model.fp8` through mcore's and Transformer Engine's own Python: which products are in FP8, and what they give.

Strategy: Transformer Engine 2.11 quantizes, gathers, keeps and multiplies as on a Hopper GPU; what it has compiled is
replaced by formulas (`fp8_kernels`), which refuse operands in the wrong order and rows or channels that are no
multiple of 16 (blocks: 128). Everything else is float32. Strictness: one rank against a native model whose linears
round by three lines of their own: the loss 1e-6, of the gradients 1e-5 where none came before, 2e-3 of the norm in
that layer, 0.1 elsewhere (a difference of 1e-7 turns a few roundings, each 25 % of a gradient's entry, and these turn
others); other layouts against the same model without FP8, 0.3, at least 1e-3; recomputation to the bit. Kernels of a
GPU are not covered.
"""

import pytest
import torch

from tests.support.spawn import run_ranks
from tests.te.fp8_bodies import Case, measured, on_one_rank

pytestmark = pytest.mark.te

FP8 = {"fp8": "current"}
TWO_RANKS = {
    "cp2": dict(cp=2),
    "tp2": dict(tp=2),
    "tp2 sp": dict(tp=2, sequence_parallel=True),
}


def distances(found, wanted):
    """Of two steps' gradients, relative to each one's norm; of the parameters that have one worth the name."""
    assert found.keys() == wanted.keys()
    largest = max(x.norm() for x in wanted.values())
    return {
        name: float((found[name] - wanted[name]).norm() / wanted[name].norm())
        for name in wanted
        if wanted[name].norm() > 1e-3 * largest
    }


def distance(found, wanted):
    return max(distances(found, wanted).values())


def test_one_rank_is_the_formula(on_one, one_rank):
    _, (ours, wanted), _ = on_one
    assert ours["products"][0] == 24, "four linears of two layers, three products each"
    assert abs(ours["loss"] - wanted["loss"]) < 1e-6 * wanted["loss"]
    last = "language.decoder.layers.1."
    close, plain = (distances(ours["gradients"], x["gradients"]) for x in (wanted, one_rank["none"]))
    assert close[f"{last}mlp.linear_fc2.weight"] < 1e-5  # nothing came before it
    assert max(value for name, value in close.items() if name.startswith(last)) < 2e-3
    assert min(value for name, value in plain.items() if name.startswith(f"{last}mlp.linear")) > 1e-2
    assert max(close.values()) < 0.1


@pytest.fixture(scope="module")
def on_one(te_python):
    cases = {
        "none": Case(),
        "fp8": Case(model=FP8),
        "selective": Case(model={**FP8, "recompute": "selective"}),
        "full": Case(model={**FP8, "recompute": "full"}),
        "chunks": Case(model={**FP8, "recompute": "selective", "mlp_chunks": 3}),
        "bias, none": Case(bias=True),
        "bias": Case(model=FP8, bias=True),
        "blocks, none": Case(wide=True, pads_as="blockwise"),
        "blocks": Case(model={"fp8": "blockwise"}, wide=True),
        "blocks, full": Case(model={"fp8": "blockwise", "recompute": "full"}, wide=True),
        "adapters, none": Case(lora=dict(language_rank=4)),
        "adapters": Case(model=FP8, lora=dict(language_rank=4)),
    }
    return run_ranks(on_one_rank, 1, te_python, cases, timeout=280, is_warm=False)[0]


@pytest.fixture(scope="module")
def one_rank(on_one):
    return on_one[0]


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
    assert 1e-3 < distance(found["gradients"], wanted["gradients"]) < 0.3


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


def test_a_step_quantizes_changed_weights_again(on_one):
    _, _, losses = on_one
    assert losses["after"] == losses["fresh"]
    assert losses["after"][0] == losses["after"][1], "the copies of a step serve all its micro batches"
    assert abs(losses["stale"] - losses["after"][0]) > 1e-3 * losses["after"][0], (
        "the comparison would see old copies"
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks(te_python):
    cases = {
        name: Case(layout=layout, model=model)
        for kind, model in (("none", {}), ("fp8", FP8), ("again", {**FP8, "recompute": "full"}))
        for name, layout in ((f"{layout}, {kind}", fields) for layout, fields in TWO_RANKS.items())
    }
    for rank in run_ranks(measured, 2, te_python, cases, timeout=560, is_warm=False):
        for layout in TWO_RANKS:
            found, wanted, again = (rank[f"{layout}, {kind}"] for kind in ("fp8", "none", "again"))
            assert found["products"][0] == 24, layout
            assert 1e-3 < distance(found["gradients"], wanted["gradients"]) < 0.3, layout
            assert distance(again["gradients"], found["gradients"]) == 0, layout
