"""Qwen2: Llama with biases of q, k and v."""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.families.decoder import HF, OURS
from megatron_v2pe.checkpoint.hf.families.llama import LLAMA
from megatron_v2pe.checkpoint.hf.rules import Rule, separate_language_heads

# fmt: off
QWEN2 = (
    *LLAMA,
    Rule((HF + "self_attn.q_proj.bias", HF + "self_attn.k_proj.bias", HF + "self_attn.v_proj.bias"),
         OURS + "self_attention.linear_qkv.bias", "A | B | B", separate_language_heads),
)
# fmt: on
