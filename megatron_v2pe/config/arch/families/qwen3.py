"""Qwen3 (InternVL3.5 1B, 2B, 4B, 8B, 14B, 38B).

A llama with an RMSNorm over each head's queries and keys, heads wider than hidden_size / heads, and no bias.
"""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.rules import LO, L, Rule

# fmt: off
QK_NORM = (
    Rule((L + "self_attn.q_norm.weight",), LO + "self_attention.q_layernorm.weight", "D"),
    Rule((L + "self_attn.k_norm.weight",), LO + "self_attention.k_layernorm.weight", "D"),
)
# fmt: on

FAMILY = LanguageFamily(
    architecture="Qwen3ForCausalLM",
    native_model_type="qwen3",
    github=(*llama.TABLE, *QK_NORM),
    class_defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    fixed={"attention_bias": False},
    qk_norm=True,
    reads_head_dim=True,
    default_head_dim=128,
    yarn=True,
)
