"""GPT-OSS (InternVL3.5-20B-A4B): biases everywhere, sinks, alternating windows, YaRN, and experts of another kind.

    sinks     one learned logit for each query head, which joins the softmax and has no value
    windows   layers 0, 2, ... see `sliding_window` tokens of their document; `layer_types` may say otherwise
    experts   all layers; each tensor of a layer holds all of them, input-major, gate and up in alternating columns:
              g0 u0 g1 u1 ...; their activation is `models.layers.clamped_experts.clamped_swiglu`

Expert tensors keep the file's layout: it splits over ep ranks along experts and over etp ranks along channels as it is.
"""

from typing import Any

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.rules import LO, L, Rule

_X, _XO = L + "mlp.experts.", LO + "mlp.experts."

# fmt: off
TABLE = (
    *(rule for rule in llama.TABLE if rule.layers == "all"),
    llama.QKV_BIAS,
    Rule((L + "self_attn.o_proj.bias",),  LO + "self_attention.linear_proj.bias",              "H"),
    Rule((L + "self_attn.sinks",),        LO + "self_attention.core_attention.softmax_offset", "N"),
    Rule((L + "mlp.router.weight",),      LO + "mlp.router.weight",        "E H"),
    Rule((L + "mlp.router.bias",),        LO + "mlp.router.bias",          "E"),
    Rule((_X + "gate_up_proj",),          _XO + "gate_up_proj",            "E H 2I"),
    Rule((_X + "gate_up_proj_bias",),     _XO + "gate_up_proj_bias",       "E 2I"),
    Rule((_X + "down_proj",),             _XO + "down_proj",               "E I H"),
    Rule((_X + "down_proj_bias",),        _XO + "down_proj_bias",          "E H"),
)
# fmt: on

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}

FAMILY = LanguageFamily(
    architecture="GptOssForCausalLM",
    native_model_type="gpt_oss",
    github=TABLE,
    class_defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    },
    fixed={"attention_bias": True, "swiglu_alpha": 1.702},
    qkv_bias=True,
    proj_bias=True,
    reads_head_dim=True,
    default_head_dim=64,
    experts=("num_local_experts", "num_experts"),
    clamped_experts=True,
    sinks=True,
    alternates_windows=True,
    yarn=True,
    template="internvl3_5_gpt_oss",
)
