"""The plain PyTorch model against numbers of the release: what `verify-numerics` trusts must be right by itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.rope_scaling import RopeScaling
from megatron_v2pe.v2pe.rope import RopeSpec, inverse_frequencies
from megatron_v2pe.verification.golden.cases import ForwardFile
from megatron_v2pe.verification.numerics.reference_model import ReferenceModel, positions_of
from megatron_v2pe.verification.numerics.reference_rope import frequencies
from megatron_v2pe.verification.numerics.transformers_model import TransformersReference

TESTS = Path(__file__).parents[2]
FILES = {  # a key is of one of the two folders
    path.stem: path
    for path in sorted(TESTS.glob("golden*/forward/[a-z]_*.json"))
    if path.stem[0] in "abcdehijl"
}
CASES = [(key, case["name"]) for key, path in FILES.items() for case in json.loads(path.read_text())["cases"]]


def golden(key, name):
    file = ForwardFile.open(FILES[key].parents[1], FILES[key])
    case = next(case for case in file.cases() if case.name == name)
    weights = HFWeights(file.checkpoint)
    assert weights.problems == []
    arch = file.architecture(case.values.get("override"))
    return case, ReferenceModel(arch, weights.read, is_v2pe=case.mode != "default")


def run(case, model):
    """Visual features, and the decoder's states from its input on."""
    hidden = None
    pixels = case.pixels()
    features = torch.zeros(0, model.arch.language.hidden_size, dtype=torch.float64)
    if len(pixels):
        *_, hidden = model.vision_states(pixels)
        features = model.features(hidden)
    tokens = case.wanted("input_ids")
    slots = (tokens == case.file.values["token_ids"]["<IMG_CONTEXT>"]).nonzero().squeeze(1)
    x = model.embed(tokens, features, slots)
    documents = (
        case.wanted("cu_seqlens").tolist() if case.file.has(f"{case.name}/cu_seqlens") else [0, len(tokens)]
    )
    return [x, *model.decoder_states(x, case.wanted("position_ids").double(), documents)]


@pytest.mark.parametrize(("key", "name"), CASES)
def test_logits_are_the_recorded_ones(key, name):
    case, model = golden(key, name)
    rows = case.wanted("logit_rows")
    logits = model.logits(run(case, model)[-1][rows])
    error = float((logits - case.wanted("logits")).abs().max())
    assert error <= max(1e-4, 8 * case.values["tolerance"]["logits_maxabs_f32_vs_f64"])


@pytest.mark.parametrize("key", [key for key, name in CASES if name == "default_single"])
def test_every_stage_is_the_recorded_one(key):
    case, model = golden(key, "default_single")
    states = run(case, model)
    del states[-2]  # recorded is the last layer's output after the norm, not before
    for index, state in enumerate(states):
        assert float((state - case.wanted(f"llm_hidden_{index}")).abs().max()) <= 1e-4, f"llm_hidden_{index}"
    pool = case.file.tensor("pixel_pool").float()
    vision = list(model.vision_states(pool))
    for index, state in enumerate(vision):
        assert float((state[0] - case.file.tensor(f"vision/tile0_hidden_{index}")).abs().max()) <= 5e-5
    wanted = case.file.tensor("vision/mlp1_out")
    assert float((model.features(vision[-1]).view_as(wanted) - wanted).abs().max()) <= 5e-5


@pytest.mark.parametrize(("key", "name"), [pair for pair in CASES if "packed" not in pair[1]])
def test_positions_are_the_recorded_ones(key, name):
    case, _ = golden(key, name)
    tokens = case.wanted("input_ids").numpy()
    per_tile = case.file.values["num_image_token"]
    visual = (tokens == case.file.values["token_ids"]["<IMG_CONTEXT>"]).tolist()
    num_images = int(np.count_nonzero(np.diff(np.array([False, *visual], dtype=int)) == 1))
    strides = case.values.get("rnd_strides") or [case.values.get("stride") or per_tile] * num_images
    found = positions_of(visual, [stride / per_tile for stride in strides])
    assert found == case.wanted("position_ids").tolist()


YARN = [
    dict(factor=4.0),
    dict(factor=32.0, truncate=False, beta_fast=8.0, beta_slow=0.5),
    dict(
        factor=2.0, attention_factor=1.0, beta_fast=1.0, beta_slow=1.0, truncate=False
    ),  # a ramp of no width
]


def with_yarn(key, keys):
    file = ForwardFile.open(FILES[key].parents[1], FILES[key])
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 512, **keys}
    return file.architecture({"llm_config.rope_scaling": scaling}), scaling


@pytest.mark.parametrize("keys", YARN, ids=str)
def test_frequencies_of_both_implementations_are_the_same(keys):
    """Qwen3 with YaRN: what the model here computes, and what the reference does, in float64."""
    arch, _ = with_yarn("h_qwen3_vit300m", keys)
    language = arch.language
    spec = RopeSpec(dim=language.head_dim, base=language.rope_theta, scaling=language.rope_scaling)
    ours = inverse_frequencies(spec, 99)
    reference = frequencies(arch, torch.tensor([98.0]), is_v2pe=True)
    torch.testing.assert_close(ours, reference, rtol=1e-14, atol=0.0)
    plain = inverse_frequencies(replace(spec, scaling=RopeScaling()), 99)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize("keys", YARN[:2], ids=str)
def test_transformers_agrees_with_yarn(keys):
    pytest.importorskip("transformers")
    key = "h_qwen3_vit300m"
    arch, scaling = with_yarn(key, keys)
    case, plain = golden(key, "packed_v2pe")
    values = json.loads((FILES[key].parents[1] / "ckpt" / key / "config.json").read_text())["llm_config"]
    ours = ReferenceModel(arch, plain._read_raw, is_v2pe=True)
    theirs = TransformersReference(
        arch, plain._read_raw, is_v2pe=True, llm_config={**values, "rope_scaling": scaling}
    )
    with torch.no_grad():
        first, second, without = (run(case, model)[-1] for model in (ours, theirs, plain))
    assert float((first - second).abs().max()) <= 1e-4
    assert float((first - without).abs().max()) > 1e-2


def test_a_wrong_frequency_is_seen():
    """The check above can fail: NTK left on where the case has V2PE positions beyond the trained length."""
    case, model = golden("a_internlm2_vit300m", "default_ntk")
    wrong = ReferenceModel(model.arch, model._read_raw, is_v2pe=True)
    rows = case.wanted("logit_rows")
    error = (wrong.logits(run(case, wrong)[-1][rows]) - case.wanted("logits")).abs().max()
    assert float(error) > 1e-2


AGREED = [
    (key, name)
    for key, name in CASES
    if key[0] in "cdehjl" and name in ("default_single", "v2pe_fix_64", "packed_v2pe")
]


@pytest.mark.parametrize(("key", "name"), AGREED)
def test_transformers_agrees(key, name):
    """Only where transformers is installed (extra `verify`); run with 5.24."""
    pytest.importorskip("transformers")
    case, plain = golden(key, name)
    llm_config = json.loads((FILES[key].parents[1] / "ckpt" / key / "config.json").read_text())["llm_config"]
    model = TransformersReference(plain.arch, plain._read_raw, is_v2pe=plain.is_v2pe, llm_config=llm_config)
    with torch.no_grad():
        theirs, ours = run(case, model), run(case, plain)
    tolerance = max(1e-4, 8 * case.values["tolerance"]["logits_maxabs_f32_vs_f64"])  # its angles are float32
    for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
        assert float((one - other).abs().max()) <= tolerance, index
