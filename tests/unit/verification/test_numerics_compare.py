"""The limits of `verify-numerics`: usual mistakes of a model are far beyond them, and where they act."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.verification.numerics import compare, reference_model
from megatron_v2pe.verification.numerics.captured import stage_names
from megatron_v2pe.verification.numerics.compare import (
    TOLERANCES,
    StageRow,
    compare_stages,
    format_rows,
    reference_stages,
    to_json,
)
from megatron_v2pe.verification.numerics.inputs import make_inputs
from megatron_v2pe.verification.numerics.reference_model import ReferenceModel

CKPT = Path(__file__).parents[2] / "golden" / "ckpt"
LIMIT = TOLERANCES["float32"]


def model(key, *, is_v2pe=True, read=None, **changes):
    """A reference, with fields of its architecture changed: `language__rope_theta=...`."""
    arch = read_architecture(CKPT / key)
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        new = (
            {field: value} if not part else {part: dataclasses.replace(getattr(arch, part), **{field: value})}
        )
        arch = dataclasses.replace(arch, **new)
    return ReferenceModel(arch, read or HFWeights(CKPT / key).read, is_v2pe=is_v2pe)


def rows_of_mistake(key, wrong, *, stride=1, wrong_stride=None):
    right = model(key)
    inputs = make_inputs(right.arch, stride=stride)
    outputs = dict(reference_stages(wrong, make_inputs(right.arch, stride=wrong_stride or stride)))
    return compare_stages(right, inputs, outputs, tolerance=LIMIT)


def first_failure(rows):
    failing = [row for row in rows if not row.passes]
    assert failing, "the mistake was not seen"
    return failing[0].name, failing[0].relative


A, C, E = "a_internlm2_vit300m", "c_qwen2_vit300m", "e_phi3_vit300m"


@pytest.mark.parametrize(
    ("key", "changes", "stage"),
    [
        (A, {"pixel_shuffle_version": "v1"}, "projector"),
        (A, {"language__rope_theta": 10000.0}, "decoder.layer.1"),
        (C, {"language__qkv_bias": False}, "decoder.layer.1"),
        (
            E,
            {
                "language__rope_scaling": dataclasses.replace(
                    read_architecture(CKPT / E).language.rope_scaling, attention_factor=1.0
                )
            },
            "decoder.layer.1",
        ),
    ],
    ids=["pixel shuffle v1", "rope theta", "no qkv bias", "attention factor"],
)
def test_a_wrong_architecture(key, changes, stage):
    name, error = first_failure(rows_of_mistake(key, model(key, **changes)))
    assert name == stage
    assert error > 10 * LIMIT


def test_a_stride_off_by_one_unit():
    """1/16 of a position for each visual token."""
    name, error = first_failure(rows_of_mistake(A, model(A), stride=4, wrong_stride=5))
    assert name == "decoder.layer.1"
    assert error > 10 * LIMIT


def test_another_gelu(monkeypatch):
    right = dict(reference_stages(model(A), make_inputs(model(A).arch, stride=1)))
    monkeypatch.setattr(reference_model.F, "gelu", functools.partial(F.gelu, approximate="tanh"))
    rows = compare_stages(model(A), make_inputs(model(A).arch, stride=1), right, tolerance=LIMIT)
    assert first_failure(rows)[0] == "vision.layer.1"


def test_a_document_that_sees_the_one_before():
    right, wrong = model(A), model(A)
    inputs = make_inputs(right.arch, stride=1)
    joined = wrong.decoder_states
    wrong.decoder_states = lambda x, positions, documents: joined(x, positions, [0, documents[-1]])
    rows = compare_stages(right, inputs, dict(reference_stages(wrong, inputs)), tolerance=LIMIT)
    assert first_failure(rows)[0] == "decoder.layer.1"


def test_swapped_gate_and_up():
    weights = HFWeights(CKPT / A)
    swap = {"feed_forward.w1.": "feed_forward.w3.", "feed_forward.w3.": "feed_forward.w1."}

    def read(name):
        for old, new in swap.items():
            if old in name:
                return weights.read(name.replace(old, new))
        return weights.read(name)

    name, error = first_failure(rows_of_mistake(A, model(A, read=read)))
    assert name == "decoder.layer.1"
    assert error > 100 * LIMIT


def test_every_stage_of_the_reference_is_a_stage_of_ours():
    reference = model(A)
    names = [name for name, _ in reference_stages(reference, make_inputs(reference.arch, stride=0))]
    assert names == stage_names(reference.arch, every=1)
    assert len(stage_names(reference.arch, every=0)) == len(names)
    assert "decoder.layer.1" not in stage_names(reference.arch, every=2)


def test_rows():
    nan = StageRow("x", 1.0, float("nan"), 1.0)
    zero = StageRow("y", 0.0, 0.0, 1e-5)
    assert (nan.passes, zero.passes, zero.relative) == (False, True, 0.0)
    text = format_rows([zero, nan])
    assert text.splitlines()[-1] == "1 of 2 stages pass; largest relative error nan at x"
    assert json.loads(json.dumps(to_json([zero])))[0]["passes"] is True


def test_inputs_are_the_same_everywhere_and_fit_the_model():
    arch = read_architecture(CKPT / A)
    one, other = make_inputs(arch, stride=4), make_inputs(arch, stride=4)
    assert torch.equal(one.pixels, other.pixels)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.tokens.max() < arch.language.vocab_size
    assert int(one.is_visual.sum()) == 3 * arch.tokens_per_tile
    pack = one.pack(pad_to_multiple=8)
    assert [document.num_images for document in pack.layout.documents] == [1, 1, 0]
    assert compare.reference_positions(one)[7:10].tolist() == [6.25, 6.5, 6.75]
