"""The parts of a proof, one process: layouts made smaller, narrow models of published ones, shapes, the page."""

import dataclasses
import json

import numpy as np
import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.config.sections.moe import MoEConfig
from megatron_v2pe.config.validate import validate
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.parallel.shards import Sharding
from megatron_v2pe.v2pe.layout import pack_layout
from megatron_v2pe.verification.prove.certificate import (
    FLOAT32,
    FLOAT64,
    Caught,
    Certificate,
    clearest,
    left_out,
    tolerances,
    worst,
)
from megatron_v2pe.verification.prove.layout import proven_layout
from megatron_v2pe.verification.prove.mutations import MUTATIONS, ProofFacts
from megatron_v2pe.verification.prove.narrow import check_provable, narrow_architecture, narrow_config
from megatron_v2pe.verification.prove.ranks import Task, read_task
from megatron_v2pe.verification.prove.shapes import (
    DocumentShape,
    _fitting,
    filled_pack,
    from_arrays,
    scaled_document,
    to_arrays,
)
from megatron_v2pe.verification.prove.slices import not_compared
from tests.support.packs import layout_of

ARCH = {name: parse_architecture(values) for name, values in PUBLISHED.items()}
DENSE = ARCH["2B"]
EXPERTS = next(arch for arch in ARCH.values() if arch.language.experts is not None)


def smaller(max_ranks, arch=DENSE, **parallel):
    found = proven_layout(ParallelConfig(**parallel), arch, max_ranks=max_ranks)
    return {name: getattr(found.parallel, name) for name in ("tp", "pp", "cp")} | {"dp": found.dp}


@pytest.mark.parametrize(
    ("parallel", "max_ranks", "wanted"),
    [
        (dict(cp=2), 2, dict(tp=1, pp=1, cp=2, dp=1)),
        (dict(cp=2), 8, dict(tp=1, pp=1, cp=2, dp=2)),
        (dict(cp=8), 4, dict(tp=1, pp=1, cp=4, dp=1)),
        (dict(tp=8, pp=4, cp=4), 8, dict(tp=2, pp=2, cp=2, dp=1)),
        (dict(tp=2, cp=6), 8, dict(tp=2, pp=1, cp=3, dp=1)),
        (dict(cp=3, tp=2), 4, dict(tp=2, pp=1, cp=2, dp=1)),
        (dict(), 2, dict(tp=1, pp=1, cp=1, dp=2)),
    ],
)
def test_axes_become_smaller_and_never_one(parallel, max_ranks, wanted):
    assert smaller(max_ranks, **parallel) == wanted


def test_an_axis_is_not_left_out():
    with pytest.raises(ConfigError, match=r"--ranks is 4.*cp 2 x pp 2 x tp 2, need 8"):
        smaller(4, tp=4, pp=2, cp=8)


def test_what_became_smaller_is_said():
    notes = proven_layout(ParallelConfig(cp=8, tp=2), DENSE, max_ranks=4).notes
    assert notes == (
        "cp 2 for the run's 8",
        "dp 1: no ranks are left for a second replica, whose sums are those of cp",
    )


def test_overlap_needs_ranks_that_reduce():
    run = ParallelConfig(tp=2, overlap_grad_reduce=True, overlap_param_gather=True)
    alone = proven_layout(run, DENSE, max_ranks=2)
    assert not alone.parallel.overlap_grad_reduce
    assert alone.notes[-1].startswith("overlap_grad_reduce false")
    assert proven_layout(run, DENSE, max_ranks=4).parallel.overlap_param_gather


def test_stages_keep_their_kind():
    layout = proven_layout(ParallelConfig(pp=4, pipeline_layout="Et*3|t*8|t*8|t*5L"), DENSE, max_ranks=4)
    assert layout.parallel.pipeline_layout == "Et|tt|tt|ttL"
    assert layout.num_layers == 7
    even = proven_layout(ParallelConfig(pp=4, pipeline_layout="Et*3|t*8|t*8|t*5L"), DENSE, max_ranks=2)
    assert (even.parallel.pipeline_layout, even.num_layers) == ("", 2)


def test_experts_keep_as_many_ranks_as_there_are():
    run = ParallelConfig(tp=2, sequence_parallel=True, ep=8)
    layout = proven_layout(run, EXPERTS, max_ranks=4)
    assert (layout.parallel.ep, layout.dp) == (4, 2)


LAYOUTS = {
    "cp": ParallelConfig(cp=2),
    "tp, sp, pp": ParallelConfig(tp=2, pp=2, sequence_parallel=True),
    "split tower": ParallelConfig(tp=2, sequence_parallel=True, vision="tensor"),
    "by document": ParallelConfig(tp=2, cp=2, sequence_parallel=True, cp_sharding="by_document"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", ARCH)
def test_every_published_model_has_a_narrow_one(size, name):
    """The narrow model passes the rules of a run, and is of the true one's kind."""
    arch, parallel = ARCH[size], LAYOUTS[name]
    layout = proven_layout(parallel, arch, max_ranks=8)
    narrow = narrow_architecture(arch, layout, tile_side=4)
    run = RunConfig(
        parallel=parallel,
        model=ModelConfig(checkpoint="/c"),
        data=DataConfig(meta="/m"),
        runtime=RuntimeConfig(run_dir="/r"),
    )
    config, _ = narrow_config(run, layout, num_packs=4)
    validate(config, narrow, layout.world_size)
    small, true = narrow.language, arch.language
    assert small.num_heads // small.num_kv_heads == true.num_heads // true.num_kv_heads
    assert small.vocab_size % 64 == true.vocab_size % 64
    assert small.hidden_size < 700
    for field in ("architecture", "qkv_bias", "qk_norm", "tie_word_embeddings"):
        assert getattr(small, field) == getattr(true, field)
    assert (small.experts is None) == (true.experts is None)
    assert narrow.vision.norm_type == arch.vision.norm_type
    assert narrow.tokens_per_tile == 4


def test_what_cannot_be_proven_is_refused():
    with pytest.raises(ConfigError, match=r"moe.capacity_factor is 1.5"):
        check_provable(RunConfig(moe=MoEConfig(capacity_factor=1.5)), EXPERTS)
    check_provable(RunConfig(), DENSE)


def document(spans, supervised=()):
    layout = layout_of([spans], pad_to_multiple=1).documents[0]
    weights = np.zeros(layout.num_tokens, dtype=np.float32)
    weights[list(supervised)] = 0.5
    return layout, weights


def test_a_document_is_scaled():
    layout, weights = document([8, "2@4", 4, "1@2", 8], supervised=range(26, 30))
    found = scaled_document(layout, weights, 2)
    assert found.layout.num_tokens == 4 + 4 + 2 + 2 + 4
    assert found.layout.image_starts.tolist() == [4, 10]
    assert found.layout.num_tiles.tolist() == [2, 1]
    assert found.layout.strides.tolist() == [2, 1]
    assert np.flatnonzero(found.weights).tolist() == [13, 14]  # 24 + 2..5 of 8 text tokens


def test_text_never_vanishes_and_some_label_stays():
    layout, weights = document([1, "4@4", 1], supervised=[17])
    found = scaled_document(layout, weights, 1, 4)
    assert found.layout.num_tokens == 1 + 1 + 1
    assert found.weights.any()


def test_packs_fit_their_budget():
    shapes = tuple(DocumentShape(layout=a, weights=b) for a, b in (document([9, "1@4", 9]), document([40])))
    assert [each.layout.num_tokens for each in _fitting(shapes, 30)] == [22]
    (cut,) = _fitting(shapes[1:], 16)
    assert cut.layout.num_tokens == 16
    (before_image,) = _fitting(shapes[:1], 11)
    assert (before_image.layout.num_tokens, before_image.layout.num_images) == (9, 0)


def test_shapes_and_tasks_survive_their_files(tmp_path):
    shapes = ((DocumentShape(layout=document([3, "1@2", 2])[0], weights=np.ones(9, dtype=np.float32)),),)
    np.savez(tmp_path / "x.npz", **to_arrays(shapes))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        ((found,),) = from_arrays(arrays)
    assert found.layout.strides.tolist() == [2]
    assert found.weights.tolist() == [1.0] * 9
    layout = proven_layout(ParallelConfig(cp=2), DENSE, max_ranks=2)
    task = Task(hf_folder="/x", layout=layout, tile_side=4, mutations=("a",))
    task.write(tmp_path)
    assert read_task(tmp_path) == task


def test_contents_do_not_depend_on_padding():
    arch = narrow_architecture(DENSE, proven_layout(ParallelConfig(cp=2), DENSE, max_ranks=2), tile_side=4)
    shape = (DocumentShape(layout=document([3, "1@2", 2])[0], weights=np.ones(9, dtype=np.float32)),)
    packs = [
        filled_pack(shape, 0, arch, pad_to_multiple=pad, tile_range_of=lambda n: (0, n)) for pad in (1, 8)
    ]
    assert packs[1].tokens[:9].tolist() == packs[0].tokens.tolist()
    assert packs[1].labels[:9].tolist() == packs[0].labels.tolist()
    assert (packs[0].tiles == packs[1].tiles).all()
    assert packs[1].loss_weights[9:].tolist() == [0.0] * 7


def facts(mode="zigzag", documents=((8,), (8,)), **parallel):
    run = RunConfig(parallel=ParallelConfig(**parallel))
    plan = resolve(run.parallel, run.parallel.replica_size)
    pack = pack_layout(
        [layout_of([list(each)], pad_to_multiple=1).documents[0] for each in documents],
        pad_to_multiple=plan.pad_to_multiple,
    )
    return ProofFacts(plan=plan, config=run, sharding=Sharding(mode=mode, linear_tokens=1), layouts=[pack])


def test_mutations_apply_where_they_can_show():
    assert applied(facts(cp=2)) == {
        "labels shifted after the cut",
        "zigzag over the whole row",
        "positions sliced contiguously",
        "positions of another rank",
        "keys get no gradients of other ranks",
        "gradients divided by each rank's own weights",
    }
    assert "labels shifted after the cut" not in applied(
        facts("by_document", cp=2)
    )  # both documents are whole
    assert "zigzag over the whole row" not in applied(facts(cp=2, documents=((8,),)))
    assert applied(facts(pp=2)) == {"positions reversed on later stages"}
    assert "image rows in another order" in applied(facts(cp=2, documents=((4, "1@1", 3),)))


def applied(of):
    return {name for name, mutation in MUTATIONS.items() if mutation.applies(of)}


def certificate(**changes):
    layout = proven_layout(ParallelConfig(cp=2), DENSE, max_ranks=2)
    values = dict(
        facts={"run": "r.yaml"},
        run=ParallelConfig(cp=2),
        layout=layout,
        notes=["a note"],
        errors={
            "float64": {"loss": (0.0, "step 1"), "gradient": (1e-15, "w")},
            "float32": {"loss": (1e-8, "step 1")},
        },
        limits=tolerances(100),
        not_compared=[],
        caught=[Caught(name="m", quantity="loss", error=1e-2, times=1e4)],
        left_out={"n": "cannot be here: needs pp"},
        seconds=3.0,
    )
    return Certificate(**{**values, **changes})


def test_the_verdict():
    assert certificate().is_proven
    assert certificate().verdict.startswith("PROVEN")
    wrong = certificate(errors={"float64": {"loss": (1e-9, "step 1")}})
    assert not wrong.is_proven
    assert "does not give the numbers of one rank" in wrong.verdict
    missed = certificate(caught=[Caught(name="m", quantity="loss", error=1e-5, times=10.0)])
    assert not missed.is_proven
    assert missed.verdict.endswith("with these mistakes too: m.")
    nothing = certificate(caught=[])
    assert not nothing.is_proven
    assert "no mistake could be put" in nothing.verdict
    assert not certificate(not_compared=["w"]).is_proven
    assert not certificate(errors={"float64": {"loss": (float("inf"), "step 1")}}).is_proven


def test_the_page_and_its_numbers():
    page = certificate().markdown()
    for text in (
        "| cp | 2 | 2 |",
        "- a note",
        "| float64 | gradient | 1.0e-15 |",
        "| m | loss |",
        "needs pp",
    ):
        assert text in page
    values = json.loads(json.dumps(certificate().as_json(), allow_nan=False))
    assert values["is_proven"] is True
    infinite = certificate(errors={"float64": {"loss": (float("inf"), "step 1")}}).as_json()
    assert infinite["errors"]["float64"]["loss"]["error"] is None


def test_the_worst_rank_counts():
    found = worst([{"loss": [1e-9, "a"]}, {"loss": [float("nan"), "b"]}])
    assert found == {"loss": (float("inf"), "b")}
    assert clearest("m", {"loss": (1e-3, "a"), "norm": (1e-3, "b")}, FLOAT32).quantity == "loss"


def test_float32_limits_grow_with_the_sums():
    assert tolerances(100) == {"float64": FLOAT64, "float32": FLOAT32}
    assert tolerances(1600)["float32"]["gradient"] == pytest.approx(2 * FLOAT32["gradient"])
    assert tolerances(1600)["float64"] == FLOAT64


def test_mutations_that_say_nothing_are_explained():
    found = left_out(
        ["positions of another rank", "zigzag over the whole row"], ["zigzag over the whole row"]
    )
    assert "zigzag over the whole row" not in found
    assert found["positions of another rank"].startswith("changed no bit")
    assert found["norms without the mark"].startswith("cannot be here: needs sequence parallelism")


def test_uncompared_elements_are_named():
    half = ("w", [(0, 2)], (4,))
    assert not_compared([[half], [half]], ["w"]) == ["w"]
    assert not_compared([[half], [("w", [(2, 4)], (4,))]], ["w"]) == []
    assert not_compared([[("w", [(0, 4)], (4,))]], ["w", "v"]) == ["v"]


def test_notes_of_changed_settings():
    run = RunConfig(
        model=ModelConfig(recompute="full", offload_activations=True),
        vision=dataclasses.replace(RunConfig().vision, drop_path_rate=0.1),
        parallel=ParallelConfig(cp=2),
    )
    _, notes = narrow_config(run, proven_layout(run.parallel, DENSE, max_ranks=2), num_packs=2)
    assert [note.split(" ")[0] for note in notes] == [
        "model.offload_activations",
        "vision.drop_path_rate",
        "float32",
    ]
