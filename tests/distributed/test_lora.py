"""Adapters under parallel layouts: the same gradients, norms, losses and updates as on one rank.

All adapters are drawn (B is not zero), so that gradients of A are not zero either. Tolerances are those of the
parity matrix (`tests/numerics/test_parity_matrix.py`). Three families: wqkv fused in Hugging Face; q, k, v apart; gate
and up fused in Hugging Face. With dropout nothing can be compared with one rank, whose masks are others.
"""

import contextlib
import dataclasses

import pytest
import torch

from megatron_v2pe.config.schema import LoRAConfig, ParallelConfig
from megatron_v2pe.verification.prove import slices as whole
from tests.support import parity
from tests.support.parity import Layout, Options, Work
from tests.support.parity_cases import Case
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCES = {"loss": 1e-6, "norm": 3e-6, "gradient": 1e-5, "weight 1": 3e-4, "weight 2": 3e-4}

EVERYWHERE = LoRAConfig(language_rank=4, vision_rank=3, projector_rank=2)
INTERNLM2 = Options(lora=EVERYWHERE)
# Queries and values alone, as many do; the projector is trained whole.
LLAMA = Options(
    architecture="LlamaForCausalLM",
    freeze_vision=True,
    lora=LoRAConfig(language_rank=4, alpha=3.0, targets=("q_proj", "v_proj", "up_proj", "down_proj")),
)
PHI3 = Options(
    architecture="Phi3ForCausalLM",
    freeze_vision=True,
    freeze_projector=True,
    lora=LoRAConfig(language_rank=2),
)
VISION = Options(freeze_language=True, freeze_projector=True, lora=LoRAConfig(vision_rank=2))
SPREAD = Case("packed", "spread", "v2pe_random")


def work(name, options, *, sp=False, layout="", recompute="none", micro_batch_tiles=0, **parallel):
    sizes = ParallelConfig(sequence_parallel=sp, pipeline_layout=layout, **parallel)
    return Work(name, Layout(sizes, options, recompute, micro_batch_tiles), (SPREAD,))


WORK = [
    work("tp2", INTERNLM2, tp=2),
    work("tp2 sp", INTERNLM2, tp=2, sp=True),
    work("tp2 sp, split tower", INTERNLM2, tp=2, sp=True, vision="tensor"),
    work("pp2", INTERNLM2, pp=2),
    work("cp2", INTERNLM2, cp=2),
    work("Llama, tp2 sp", LLAMA, tp=2, sp=True),
    work("Phi-3, tp2 sp", PHI3, tp=2, sp=True),
    work("Phi-3, pp2, nothing trained in the first stage", PHI3, pp=2, layout="E|ttttL"),
]
RECOMPUTED = dict(recompute="full", micro_batch_tiles=1)
MORE_WORK = [
    work("tp2, split tower", INTERNLM2, tp=2, vision="tensor"),
    work("dp2", INTERNLM2),
    work("tp2 sp, full recompute, 1 tile at a time", INTERNLM2, tp=2, sp=True, **RECOMPUTED),
    work("cp2, selective recompute", INTERNLM2, cp=2, recompute="selective"),
    work("Llama, tp2", LLAMA, tp=2),
    work("Llama, pp2, no decoder layer in the first stage", LLAMA, pp=2, layout="E|ttttL"),
    work("vision alone, pp2, nothing trained in the second stage", VISION, pp=2),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    wanted = sorted({(SPREAD, row.layout.options) for row in [*WORK, *MORE_WORK]}, key=str)
    return parity.reference_file(tmp_path_factory.mktemp("reference"), wanted)


def check(work, reference):
    found = parity.compare_ranks(2, work, reference, timeout=380)
    beyond = [
        f"{name} {quantity}: {error:.2g}, {TOLERANCES[quantity]:g} allowed, worst in {where}"
        for (name, _), quantities in found.items()
        for quantity, (error, where) in quantities.items()
        if not error <= TOLERANCES[quantity]
    ]
    assert beyond == [], "\n".join(beyond)


@pytest.mark.timeout(400)
def test_equal_to_one_rank(reference):
    check(WORK, reference)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_equal_to_one_rank_in_more_layouts(reference):
    check(MORE_WORK, reference)


@contextlib.contextmanager
def replaced(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_exchange():
    """Row linears: A's partial sums are not added up, so every rank adds its own part."""
    from megatron_v2pe.assembly import adapters

    return replaced(adapters, "_exchange", lambda split, *, is_row: adapters._unchanged)


def no_marks():
    """Under sequence parallelism the factors that are whole on each rank keep the gradients of its own tokens."""
    from megatron_v2pe.models.layers.lora import FusedAdapters

    return replaced(FusedAdapters, "mark", lambda self, *, sequence_parallel: None)


WRONG = {
    "nothing is exchanged": (work("1", INTERNLM2, tp=2), no_exchange, "loss"),
    "no marks": (work("2", INTERNLM2, tp=2, sp=True), no_marks, "gradient"),
}


@pytest.mark.slow
def test_wrong_variants_are_seen(reference):
    rows = [Work(name, row.layout, row.cases, mutation) for name, (row, mutation, _) in WRONG.items()]
    found = parity.compare_ranks(2, rows, reference, timeout=120)
    for name, (_, _, quantity) in WRONG.items():
        error, _ = found[name, str(SPREAD)][quantity]
        assert error > 1e-3, (name, quantity, error)


def test_adapters_are_trained_and_what_they_are_added_to_is_not(reference):
    """Every adapter has a gradient, on every named linear; the rest of a part with adapters has none."""
    _, scales = reference
    for (_, options), by_key in scales.items():
        whole = {
            part
            for part, frozen in (("projector", options.freeze_projector), ("vision", options.freeze_vision))
            if not frozen and not options.lora.rank_of(part)
        }
        wrong = [
            key
            for key, scale in by_key.items()
            if (scale > 0) != (".lora." in key or key.partition(".")[0] in whole)
        ]
        assert wrong == [], options
    adapters = {
        key.split(".lora.")[1].partition(".")[0] for key in scales[str(SPREAD), LLAMA] if ".lora." in key
    }
    assert adapters == {"q_proj", "v_proj", "up_proj", "down_proj"}


FIRST_VALUES = {
    "one rank": (1, ParallelConfig()),
    "tp2 sp": (2, ParallelConfig(tp=2, sequence_parallel=True)),
    "tp2, split tower": (2, ParallelConfig(tp=2, vision="tensor")),
    "pp2": (2, ParallelConfig(pp=2)),
}


def draw(rank, world_size, sizes):
    """Adapters that a rank starts from, as slices; the tower has five heads, which two ranks pad to six."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.checkpoint.adapters.weights import draw_adapters

    arch = INTERNLM2.arch
    arch = dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, hidden_size=40, num_heads=5))
    found = {}
    for name, parallel in sizes.items():
        layout = Layout(parallel, INTERNLM2)
        context = parity.join(layout, world_size)
        ranks = context.ranks
        model_chunks = build_model(layout.config(SPREAD), arch, context)
        draw_adapters(model_chunks, lora=EVERYWHERE, arch=arch, seed=7, ranks=ranks)
        found[name] = [held for held in whole.slices_of(model_chunks, ranks) if ".lora." in held[0]]
    return found


def test_every_layout_starts_from_the_same_adapters():
    """Bit for bit; what pads the heads of a split tower is zero, and so are all B."""
    by_world = {
        count: run_ranks(draw, count, {n: p for n, (c, p) in FIRST_VALUES.items() if c == count})
        for count in (1, 2)
    }
    ((reference,),) = [list(found.values()) for found in by_world[1]]
    wholes = {key: data for key, _, _, data in reference}
    assert all(data.any() == key.endswith("lora_A") for key, data in wholes.items())
    held = dict.fromkeys(wholes, 0)
    for found in by_world[2]:
        for tensors in found.values():
            for key, slices, _, data in tensors:
                real = wholes[key][slices]
                inside = data[tuple(slice(size) for size in real.shape)]
                assert torch.equal(inside, real), key
                assert data.count_nonzero() == inside.count_nonzero(), key
                held[key] += 1
    assert all(held.values())


def train_with_dropout(rank, world_size, layouts):
    """What each rank holds after two updates, as slices."""
    found = {}
    for name, layout in layouts.items():
        found[name] = parity.two_steps(layout, SPREAD, parity.join(layout, world_size))
    return {name: (outcome.losses, outcome.weights[-1]) for name, outcome in found.items()}


@pytest.mark.slow
def test_dropout_keeps_copies_equal_and_changes_the_loss():
    """Where tp ranks see the same input they must zero the same part of it, or their copies of A drift apart."""
    plain, dropout = INTERNLM2, Options(lora=dataclasses.replace(EVERYWHERE, dropout=0.5))
    sizes = {"tp2": ParallelConfig(tp=2), "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True)}
    layouts = {name: Layout(parallel, dropout) for name, parallel in sizes.items()}
    layouts["recomputed"] = Layout(sizes["tp2 sp"], dropout, recompute="full")
    layouts["plain"] = Layout(sizes["tp2"], plain)
    first, second = run_ranks(train_with_dropout, 2, layouts, timeout=120)
    for name, (losses, tensors) in first.items():
        other = {(key, str(slices)): data for key, slices, _, data in second[name][1]}
        copies = [(key, data, other.get((key, str(slices)))) for key, slices, _, data in tensors]
        compared = [key for key, data, copy in copies if copy is not None]
        assert [key for key, data, copy in copies if copy is not None and not torch.equal(data, copy)] == []
        assert any(".lora." in key for key in compared)
        assert name == "plain" or losses != first["plain"][0]
    # Masks are drawn again alike when a layer runs again.
    assert first["recomputed"][0] == pytest.approx(first["tp2 sp"][0], rel=1e-6)
