"""A model that is almost one of those known: refused by name from config.json, whatever its weights are."""

import json

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.families import FAMILIES
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import FAMILIES_GOLDEN, GOLDEN

QWEN3, MOE = (FAMILIES_GOLDEN / "ckpt" / key for key in ("h_qwen3_vit300m", "j_qwen3moe_vit300m"))
NATIVE_MOE, NATIVE_6B = (FAMILIES_GOLDEN / "ckpt_hf" / key for key in (MOE.name, "i_qwen3_vit6b"))
GPT_OSS = FAMILIES_GOLDEN / "ckpt" / "l_gptoss_vit300m"
NATIVE_GPT_OSS = FAMILIES_GOLDEN / "ckpt_hf" / GPT_OSS.name
LLAMA = GOLDEN.parent / "d_llama_vit6b"


def changed(folder, section, **changes):
    values = json.loads((folder / "config.json").read_text())
    values[section] |= changes
    return values


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh', known values are 'silu'"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'.* known values are 'rms_norm'"),
        ({"sandwich_norm": True}, "sandwich_norm is True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"use_sliding_window": True, "sliding_window": 128}, "sliding_window is 128, shorter than"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"attention_bias": True}, "attention_bias is True, known values are False"),
        ({"rope_scaling": {"rope_type": "ntk_by_parts", "factor": 4.0}}, "type 'ntk_by_parts' is unknown"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor is 0.5.* YaRN has a factor of at least 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}}, "beta_slow 2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "default", "mrope_section": [8, 4, 4]}}, "mrope_section is set.*MRoPE"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}, "type 'proportional' is unknown"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "has an object for sliding_attention"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 1000000.0 and rope_parameters.rope_theta 5000"),
        ({"num_experts": 8}, "num_experts is 8, but Qwen3ForCausalLM has one MLP in each layer"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_language_models(changes, words):
    with pytest.raises(CheckpointError, match=words):
        parse_architecture(changed(QWEN3, "llm_config", **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok is 9, but must lie in 2..num_experts = 8"),
        ({"num_local_experts": 16}, "has num_experts 8 and num_local_experts 16, which mean the same"),
        ({"num_experts": 0}, "without a layer that has experts"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"n_group": 4}, "n_group is 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize(("folder", "section"), [(MOE, "llm_config"), (NATIVE_MOE, "text_config")])
def test_experts(folder, section, changes, words):
    with pytest.raises(CheckpointError, match=words):
        parse_architecture(changed(folder, section, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["sliding_attention", "chunked_attention"] * 2}, "layer_types has 4 layers of chunked_att"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 layers of .* there are 4 layers"),
        ({"sliding_window": None}, "sliding_window is null, which versions of transformers read differently"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"rope_scaling": None}, "rope_scaling is null"),
        ({"rope_scaling": {"rope_type": "ntk_by_parts"}}, "type 'ntk_by_parts' is unknown"),
        ({"attention_bias": False}, "attention_bias is False, known values are True"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0, known values are 1.702"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"experts_per_token": 4}, "has num_experts_per_tok 2 and experts_per_token 4, which mean the same"),
        ({"num_experts_per_tok": 9, "experts_per_token": 9}, "must lie in 2..num_local_experts = 8"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ({"moe_intermediate_size": 64}, "moe_intermediate_size is 64"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"attention_chunk_size": 64}, "attention_chunk_size is 64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize(("folder", "section"), [(GPT_OSS, "llm_config"), (NATIVE_GPT_OSS, "text_config")])
def test_gpt_oss(folder, section, changes, words):
    with pytest.raises(CheckpointError, match=words):
        parse_architecture(changed(folder, section, **changes))


def test_gpt_oss_whose_config_leaves_out_defaults():
    """transformers writes no default values; which layers have a window, the class says."""
    values = changed(GPT_OSS, "llm_config")
    whole = parse_architecture(values).language
    for key in (
        "layer_types",
        "rope_scaling",
        "rope_theta",
        "swiglu_limit",
        "attention_bias",
        "rms_norm_eps",
    ):
        del values["llm_config"][key]
    assert parse_architecture(values).language == whole
    assert (whole.window, whole.is_windowed) == (8, (True, False, True, False))
    values["llm_config"]["layer_types"] = ["full_attention"] * 3 + ["sliding_attention"]
    assert parse_architecture(values).language.is_windowed == (False, False, False, True)
    values["llm_config"]["layer_types"] = ["full_attention"] * 4
    assert (parse_architecture(values).language.window, parse_architecture(values).language.num_windowed) == (
        0,
        0,
    )


@pytest.mark.parametrize("folder", [QWEN3, NATIVE_6B], ids=["github", "native"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "quick_gelu"}, "vision_config: hidden_act is 'quick_gelu', known values are 'gelu'"),
        ({"num_channels": 4}, "vision_config: num_channels is 4"),
        ({"norm_type": "group_norm"}, "norm_type is 'group_norm'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_vision_towers(folder, changes, words):
    with pytest.raises(CheckpointError, match=words):
        parse_architecture(changed(folder, "vision_config", **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_seq_length": 256}, "image_seq_length is 256, known values are 4"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2, known values are -1"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_native_folders(changes, words):
    with pytest.raises(CheckpointError, match=words):
        parse_architecture(json.loads((NATIVE_MOE / "config.json").read_text()) | changes)


def test_values_that_change_nothing_are_accepted():
    neutral = {
        "attn_logit_softcapping": None,
        "scoring_func": "softmax",
        "no_rope_layers": [],
        "alibi": False,
    }
    assert parse_architecture(changed(QWEN3, "llm_config", **neutral)).language.qk_norm
    assert parse_architecture(
        changed(QWEN3, "llm_config", norm_type="rms_norm", num_experts=0)
    ).language.qk_norm


def test_rotation_as_transformers_5_writes_it_is_read_in_either_format():
    values = changed(LLAMA, "llm_config")
    theta = values["llm_config"].pop("rope_theta")
    values["llm_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    assert parse_architecture(values).language == parse_architecture(changed(LLAMA, "llm_config")).language
    values["llm_config"]["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    assert parse_architecture(values).language.rope_scaling.kind == "linear"
    native = changed(NATIVE_6B, "text_config")
    assert native["text_config"]["rope_parameters"]["rope_theta"] == 1e6
    assert parse_architecture(native).language.rope_theta == 1e6


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_key_that_is_absent_has_the_default_of_its_class(architecture):
    """Dynamic scaling starts at this length: 2048 for a Qwen2 that leaves out its default would be another model."""
    values = json.loads((LLAMA / "config.json").read_text())
    llm = values["llm_config"]
    llm["architectures"] = [architecture]
    for key in ("max_position_embeddings", "rms_norm_eps", "rope_scaling"):
        llm.pop(key, None)
    if FAMILIES[architecture].experts:
        llm |= {"num_experts": 4, "num_experts_per_tok": 2}
    if architecture == "Qwen3MoeForCausalLM":
        llm["moe_intermediate_size"] = 8
    if architecture == "GptOssForCausalLM":
        llm["attention_bias"] = True
    long = 2048 if architecture in ("LlamaForCausalLM", "InternLM2ForCausalLM") else 32768
    long, eps = (4096, 1e-5) if architecture == "Phi3ForCausalLM" else (long, 1e-6)
    long, eps = (131072, 1e-5) if architecture == "GptOssForCausalLM" else (long, eps)
    found = parse_architecture(values).language
    assert (found.max_position_embeddings, found.norm_eps) == (long, eps)
