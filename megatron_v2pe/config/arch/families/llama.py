"""Llama (InternVL2-76B) and Yi (InternVL2-40B); what Qwen2, Qwen3, InternLM3 and Phi-3 name alike."""

from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.rules import EMBEDDING, FINAL_NORM, HEAD, LO, ROTARY, L, Rule

# fmt: off
FRAME = (  # everything but queries, keys, values and the MLP's first linear
    Rule(("language_model.model.embed_tokens.weight",), EMBEDDING, "V H", "vocabulary"),
    Rule((L + "input_layernorm.weight",),          LO + "input_layernorm.weight",            "H"),
    Rule((L + "self_attn.o_proj.weight",),         LO + "self_attention.linear_proj.weight", "H A"),
    Rule((L + "post_attention_layernorm.weight",), LO + "pre_mlp_layernorm.weight",          "H"),
    Rule((L + "mlp.down_proj.weight",),            LO + "mlp.linear_fc2.weight",             "H F", layers="dense"),
    Rule(("language_model.model.norm.weight",),    FINAL_NORM,                               "H"),
    Rule(("language_model.lm_head.weight",),       HEAD,                                     "V H", "vocabulary"),
    Rule((L + "self_attn.rotary_emb.inv_freq", "language_model.model.rotary_emb.inv_freq"), reason=ROTARY),
)
TABLE = (
    *FRAME,
    Rule((L + "self_attn.q_proj.weight", L + "self_attn.k_proj.weight", L + "self_attn.v_proj.weight"),
         LO + "self_attention.linear_qkv.weight", "A H | B H | B H", "language_q_k_v"),
    Rule((L + "mlp.gate_proj.weight", L + "mlp.up_proj.weight"),
         LO + "mlp.linear_fc1.weight",            "F H", "gate_up", layers="dense"),
)
QKV_BIAS = Rule((L + "self_attn.q_proj.bias", L + "self_attn.k_proj.bias", L + "self_attn.v_proj.bias"),
                LO + "self_attention.linear_qkv.bias", "A | B | B", "language_q_k_v")
# fmt: on

FAMILY = LanguageFamily(
    architecture="LlamaForCausalLM",
    native_model_type="llama",
    github=TABLE,
    fixed={"attention_bias": False, "mlp_bias": False},
    reads_head_dim=True,
    yarn=True,
)
