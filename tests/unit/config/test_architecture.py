"""Language models read from config.json: what each family says, and what is refused rather than computed wrongly."""

import json
from pathlib import Path

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.core.errors import CheckpointError

CKPT = Path(__file__).parents[2] / "golden" / "ckpt"
INTERNLM2, QWEN2, LLAMA, PHI3 = (
    "a_internlm2_vit300m",
    "c_qwen2_vit300m",
    "d_llama_vit6b",
    "e_phi3_vit300m",
)


def language(key, **changes):
    values = json.loads((CKPT / key / "config.json").read_text())
    values["llm_config"].update(changes)
    return parse_architecture(values).language


@pytest.mark.parametrize(
    ("key", "architecture", "qkv_bias", "scaling"),
    [
        (INTERNLM2, "InternLM2ForCausalLM", False, "dynamic"),
        (QWEN2, "Qwen2ForCausalLM", True, "none"),
        (LLAMA, "LlamaForCausalLM", False, "none"),
        (PHI3, "Phi3ForCausalLM", False, "longrope"),
    ],
)
def test_families(key, architecture, qkv_bias, scaling):
    found = language(key)
    assert (found.architecture, found.qkv_bias, found.rope_scaling.kind) == (architecture, qkv_bias, scaling)
    assert found.head_dim == 16 or key == LLAMA
    assert not found.tie_word_embeddings
    assert language(key, tie_word_embeddings=True).tie_word_embeddings


def test_longrope_of_phi3():
    for name in ("su", "longrope"):
        stored = json.loads((CKPT / PHI3 / "config.json").read_text())["llm_config"]["rope_scaling"]
        scaling = language(PHI3, rope_scaling={**stored, "type": name}).rope_scaling
        assert (scaling.kind, scaling.trained_positions) == ("longrope", 4096)
        assert scaling.short_factors[:2] == (1.0094, 1.1919)
        assert scaling.long_factors[-1] == 22.8031
        assert scaling.attention_factor == pytest.approx(1.1902380714238083, rel=1e-12)  # sqrt(1 + 5/12)
    assert language(PHI3, max_position_embeddings=4096).rope_scaling.attention_factor == 1.0


def test_llama3_scaling():
    stored = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaling = language(LLAMA, rope_scaling=stored).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.trained_positions) == ("llama3", 8.0, 8192)
    assert (scaling.low_frequency_factor, scaling.high_frequency_factor) == (1.0, 4.0)


def test_yarn():
    """Qwen's documents extend a folder by these keys; DeepSeek's two scales make an attention factor of their own."""
    stored = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaling = language(QWEN2, rope_scaling=stored).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.trained_positions) == ("yarn", 4.0, 32768)
    assert (scaling.fast_turns, scaling.slow_turns, scaling.truncates) == (32.0, 1.0, True)
    assert scaling.attention_factor == pytest.approx(1.1386294361119891, rel=1e-15)  # 0.1 ln 4 + 1
    assert scaling.is_trained_in
    both = {**stored, "mscale": 1.0, "mscale_all_dim": 0.5}
    assert language(QWEN2, rope_scaling=both).rope_scaling.attention_factor == pytest.approx(1.0648, abs=1e-4)
    given = language(LLAMA, rope_scaling={**stored, "attention_factor": 1.0, "truncate": False}).rope_scaling
    assert (given.attention_factor, given.truncates) == (1.0, False)
    del stored["original_max_position_embeddings"]  # then the length of the config, as in transformers
    assert language(QWEN2, rope_scaling=stored).rope_scaling.trained_positions == 32768


def test_scaling_that_v2pe_takes_the_place_of():
    dynamic = language(INTERNLM2).rope_scaling
    assert (dynamic.factor, dynamic.trained_positions, dynamic.is_trained_in) == (2.0, 32768, False)
    assert language(PHI3).rope_scaling.is_trained_in
    # The release saves this for a checkpoint trained with V2PE, and cannot read it again.
    assert language(INTERNLM2, rope_scaling={"type": "v2pe", "factor": 2.0}).rope_scaling.kind == "none"


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        (
            QWEN2,
            {"architectures": ["Qwen4ForCausalLM"]},
            "'Qwen4ForCausalLM' is not supported; known: GptOss.*InternLM2",
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarns", "factor": 4.0}},
            "'yarns' is unknown; known: .*llama3, yarn",
        ),
        (
            INTERNLM2,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "'yarn', but the class .* has no such",
        ),
        (PHI3, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn', but the class .* has no such"),
        (LLAMA, {"rope_scaling": {"factor": 4.0}}, "type 'None' is unknown"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True, known values are False"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (INTERNLM2, {"bias": True}, "bias is True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu', known values are 'silu'"),
        (QWEN2, {"head_dim": 24}, "head_dim is 24, known values are 16"),
        (PHI3, {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        (
            PHI3,
            {"sliding_window": 2047},
            "sliding_window is 2047, shorter than max_position_embeddings 131072",
        ),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window is 4096"),
        (
            PHI3,
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}},
            "short_factor has 7 factors, but a head of 16 channels has 8 frequencies",
        ),
    ],
)
def test_refused(key, changes, words):
    with pytest.raises(CheckpointError, match=words):
        language(key, **changes)


def test_a_window_that_is_switched_off_is_accepted():
    assert language(QWEN2, sliding_window=4096).architecture == "Qwen2ForCausalLM"
    assert language(PHI3, sliding_window=None).architecture == "Phi3ForCausalLM"
