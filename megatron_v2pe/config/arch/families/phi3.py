"""Phi-3 (InternVL2-4B): fused queries, keys, values, fused gate and up, long rotary factors; no native folder."""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.rules import LO, L, Rule

# fmt: off
TABLE = (
    *llama.FRAME,
    Rule((L + "self_attn.qkv_proj.weight",), LO + "self_attention.linear_qkv.weight", "QKV H", "language_qkv"),
    Rule((L + "mlp.gate_up_proj.weight",),   LO + "mlp.linear_fc1.weight",            "2F H"),
)
# fmt: on

FAMILY = LanguageFamily(
    architecture="Phi3ForCausalLM",
    native_model_type="",
    github=TABLE,
    class_defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    always_windowed=True,
)
