"""Phi-3: Llama with fused q, k, v and fused gate and up."""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.families.decoder import HF, OURS
from megatron_v2pe.checkpoint.hf.families.llama import LLAMA_NAMES
from megatron_v2pe.checkpoint.hf.rules import Rule, language_heads

# fmt: off
PHI3 = (
    *LLAMA_NAMES,
    Rule((HF + "self_attn.qkv_proj.weight",), OURS + "self_attention.linear_qkv.weight", "QKV H", language_heads),
    Rule((HF + "mlp.gate_up_proj.weight",),   OURS + "mlp.linear_fc1.weight",            "2F H"),
)
# fmt: on
