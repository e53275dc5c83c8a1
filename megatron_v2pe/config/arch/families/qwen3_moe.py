"""Qwen3-MoE (InternVL3.5 30B-A3B, 241B-A28B): Qwen3 whose MLP is, in sparse layers, a router and its experts.

Layer i is sparse unless `mlp_only_layers` names it or (i + 1) is no multiple of `decoder_sparse_step`. A token goes
to `num_experts_per_tok` experts; their weights sum to one with `norm_topk_prob`, else they are the plain softmax.
transformers 5 writes `num_local_experts` for `num_experts`.
"""

from megatron_v2pe.config.arch.families import llama
from megatron_v2pe.config.arch.families.family import LanguageFamily
from megatron_v2pe.config.arch.families.qwen3 import QK_NORM
from megatron_v2pe.config.arch.families.rules import LO, L, Rule

_X, _XO = L + "mlp.experts.{e}.", LO + "mlp.experts.{e}."

# fmt: off
EXPERTS = (
    Rule((L + "mlp.gate.weight",),         LO + "mlp.router.weight",      "E H", layers="sparse"),
    Rule((_X + "gate_proj.weight", _X + "up_proj.weight"),
                                           _XO + "linear_fc1.weight",     "I H", "gate_up", layers="sparse"),
    Rule((_X + "down_proj.weight",),       _XO + "linear_fc2.weight",     "H I", layers="sparse"),
)
# fmt: on

FAMILY = LanguageFamily(
    architecture="Qwen3MoeForCausalLM",
    native_model_type="qwen3_moe",
    github=(*llama.TABLE, *QK_NORM, *EXPERTS),
    class_defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4},
    fixed={"attention_bias": False},
    qk_norm=True,
    reads_head_dim=True,
    experts=("num_experts", "num_local_experts"),
    yarn=True,
)
