"""Qwen2 and Qwen2.5 (InternVL2-1B; InternVL2.5 1B, 4B, 38B, 78B; InternVL3 1B, 2B, 8B, 14B, 38B, 78B).

A llama whose queries, keys and values have biases.
"""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily

FAMILY = LanguageFamily(
    architecture="Qwen2ForCausalLM",
    native_model_type="qwen2",
    github=(*llama.TABLE, llama.QKV_BIAS),
    class_defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    qkv_bias=True,
    yarn=True,
)
