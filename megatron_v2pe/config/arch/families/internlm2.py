"""InternLM2 and InternLM2.5 (InternVL2 and InternVL2.5 2B, 8B, 26B): names of its own, fused queries, keys and values.

A native folder has it as a llama: `wqkv`, whose rows lie in mcore's order, is split into three.
"""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.rules import EMBEDDING, FINAL_NORM, HEAD, LO, ROTARY, L, Rule

# fmt: off
TABLE = (
    Rule(("language_model.model.tok_embeddings.weight",), EMBEDDING, "V H", "vocabulary"),
    Rule((L + "attention_norm.weight",), LO + "input_layernorm.weight",            "H"),
    Rule((L + "attention.wqkv.weight",), LO + "self_attention.linear_qkv.weight",  "QKV H"),
    Rule((L + "attention.wo.weight",),   LO + "self_attention.linear_proj.weight", "H A"),
    Rule((L + "ffn_norm.weight",),       LO + "pre_mlp_layernorm.weight",          "H"),
    Rule((L + "feed_forward.w1.weight", L + "feed_forward.w3.weight"),
                                         LO + "mlp.linear_fc1.weight",             "F H", "gate_up"),
    Rule((L + "feed_forward.w2.weight",), LO + "mlp.linear_fc2.weight",            "H F"),
    Rule(("language_model.model.norm.weight",), FINAL_NORM,                        "H"),
    Rule(("language_model.output.weight",),     HEAD,                              "V H", "vocabulary"),
    Rule((L + "attention.rotary_emb.inv_freq",), reason=ROTARY),
)
# fmt: on

FAMILY = LanguageFamily(
    architecture="InternLM2ForCausalLM",
    native_model_type="llama",
    github=TABLE,
    native=llama.TABLE,
    native_values={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    fixed={"bias": False},
)
