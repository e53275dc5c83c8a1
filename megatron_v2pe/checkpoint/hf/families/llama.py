"""Llama (Yi, Llama-3): q, k, v, gate and up in tensors of their own. Qwen2 and Phi-3 share most of its names."""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.families.decoder import EMBEDDING, FINAL_NORM, HEAD, HF, OURS, ROTARY
from megatron_v2pe.checkpoint.hf.rules import Rule, gate_up, separate_language_heads, vocabulary

# fmt: off
LLAMA_NAMES = (  # shared by Llama, Qwen2 and Phi-3
    Rule(("language_model.model.embed_tokens.weight",), EMBEDDING,                            "V H", vocabulary),
    Rule((HF + "input_layernorm.weight",),              OURS + "input_layernorm.weight",            "H"),
    Rule((HF + "self_attn.o_proj.weight",),             OURS + "self_attention.linear_proj.weight", "H A"),
    Rule((HF + "post_attention_layernorm.weight",),     OURS + "pre_mlp_layernorm.weight",          "H"),
    Rule((HF + "mlp.down_proj.weight",),                OURS + "mlp.linear_fc2.weight",             "H F"),
    Rule(("language_model.model.norm.weight",),         FINAL_NORM,                                 "H"),
    Rule(("language_model.lm_head.weight",),            HEAD,                                 "V H", vocabulary),
    Rule((HF + "self_attn.rotary_emb.inv_freq", "language_model.model.rotary_emb.inv_freq"), reason=ROTARY),
)
LLAMA = (
    *LLAMA_NAMES,
    Rule((HF + "self_attn.q_proj.weight", HF + "self_attn.k_proj.weight", HF + "self_attn.v_proj.weight"),
         OURS + "self_attention.linear_qkv.weight", "A H | B H | B H", separate_language_heads),
    Rule((HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
         OURS + "mlp.linear_fc1.weight",            "F H", gate_up),
)
# fmt: on
