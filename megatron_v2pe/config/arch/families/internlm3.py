"""InternLM3 (InternVL3-9B): a llama with `head_dim` of its own; the class's optional biases are refused."""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily

FAMILY = LanguageFamily(
    architecture="InternLM3ForCausalLM",
    native_model_type="llama",
    github=llama.TABLE,
    native_values={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    class_defaults={"max_position_embeddings": 32768},
    fixed={"bias": False, "qkv_bias": False},
    reads_head_dim=True,
)
