"""InternLM2: fused `wqkv` with rows per kv group, as mcore has them; gate (`w1`) and up (`w3`) apart."""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.families.decoder import EMBEDDING, FINAL_NORM, HEAD, HF, OURS, ROTARY
from megatron_v2pe.checkpoint.hf.rules import Rule, gate_up, vocabulary

# fmt: off
INTERNLM2 = (
    Rule(("language_model.model.tok_embeddings.weight",), EMBEDDING,                            "V H", vocabulary),
    Rule((HF + "attention_norm.weight",),                 OURS + "input_layernorm.weight",            "H"),
    Rule((HF + "attention.wqkv.weight",),                 OURS + "self_attention.linear_qkv.weight",  "QKV H"),
    Rule((HF + "attention.wo.weight",),                   OURS + "self_attention.linear_proj.weight", "H A"),
    Rule((HF + "ffn_norm.weight",),                       OURS + "pre_mlp_layernorm.weight",          "H"),
    Rule((HF + "feed_forward.w1.weight", HF + "feed_forward.w3.weight"),
                                                          OURS + "mlp.linear_fc1.weight",       "F H", gate_up),
    Rule((HF + "feed_forward.w2.weight",),                OURS + "mlp.linear_fc2.weight",             "H F"),
    Rule(("language_model.model.norm.weight",),           FINAL_NORM,                                 "H"),
    Rule(("language_model.output.weight",),               HEAD,                                 "V H", vocabulary),
    Rule((HF + "attention.rotary_emb.inv_freq",), reason=ROTARY),
)
# fmt: on
