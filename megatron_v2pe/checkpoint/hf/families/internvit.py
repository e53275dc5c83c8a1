"""InternViT (300M with LayerNorm, 6B with RMSNorm and q/k norms) and the projector.

vision      C hidden, M MLP, P positions (patches + class token), S patch side in pixels
projector   K = C / downsample_ratio^2, H hidden of the language model
"""

from __future__ import annotations

from megatron_v2pe.checkpoint.hf.rules import Rule, vision_heads
from megatron_v2pe.config.architecture import InternVLArchitecture

# fmt: off
_HF = "vision_model.encoder.layers.{i}."
_OURS = "vision.encoder.layers.{i}."
VISION = (
    Rule(("vision_model.embeddings.class_embedding",),        "vision.class_embedding",        "1 1 C"),
    Rule(("vision_model.embeddings.position_embedding",),     "vision.position_embedding",     "1 P C"),
    Rule(("vision_model.embeddings.patch_embedding.weight",), "vision.patch_embedding.weight", "C 3 S S"),
    Rule(("vision_model.embeddings.patch_embedding.bias",),   "vision.patch_embedding.bias",   "C"),
    Rule((_HF + "norm1.weight",),     _OURS + "input_layernorm.weight",            "C"),
    Rule((_HF + "attn.qkv.weight",),  _OURS + "self_attention.linear_qkv.weight",  "3C C", vision_heads),
    Rule((_HF + "attn.proj.weight",), _OURS + "self_attention.linear_proj.weight", "C C"),
    Rule((_HF + "attn.proj.bias",),   _OURS + "self_attention.linear_proj.bias",   "C"),
    Rule((_HF + "ls1",),              _OURS + "ls1",                               "C"),
    Rule((_HF + "norm2.weight",),     _OURS + "pre_mlp_layernorm.weight",          "C"),
    Rule((_HF + "mlp.fc1.weight",),   _OURS + "mlp.linear_fc1.weight",             "M C"),
    Rule((_HF + "mlp.fc1.bias",),     _OURS + "mlp.linear_fc1.bias",               "M"),
    Rule((_HF + "mlp.fc2.weight",),   _OURS + "mlp.linear_fc2.weight",             "C M"),
    Rule((_HF + "mlp.fc2.bias",),     _OURS + "mlp.linear_fc2.bias",               "C"),
    Rule((_HF + "ls2",),              _OURS + "ls2",                               "C"),
)
VISION_LAYER_NORM = (  # InternViT-300M; RMSNorm has no bias
    Rule((_HF + "norm1.bias",),       _OURS + "input_layernorm.bias",              "C"),
    Rule((_HF + "norm2.bias",),       _OURS + "pre_mlp_layernorm.bias",            "C"),
)
VISION_QKV_BIAS = (  # InternViT-300M
    Rule((_HF + "attn.qkv.bias",),    _OURS + "self_attention.linear_qkv.bias",    "3C", vision_heads),
)
VISION_QK_NORM = (  # InternViT-6B: over the full width, before the split into heads
    Rule((_HF + "attn.q_norm.weight",), _OURS + "self_attention.q_norm.weight",    "C"),
    Rule((_HF + "attn.k_norm.weight",), _OURS + "self_attention.k_norm.weight",    "C"),
)
PROJECTOR = (
    Rule(("mlp1.0.weight",), "projector.norm.weight",           "K"),
    Rule(("mlp1.0.bias",),   "projector.norm.bias",             "K"),
    Rule(("mlp1.1.weight",), "projector.mlp.linear_fc1.weight", "H K"),
    Rule(("mlp1.1.bias",),   "projector.mlp.linear_fc1.bias",   "H"),
    Rule(("mlp1.3.weight",), "projector.mlp.linear_fc2.weight", "H H"),
    Rule(("mlp1.3.bias",),   "projector.mlp.linear_fc2.bias",   "H"),
)
# fmt: on


def vision_table(arch: InternVLArchitecture) -> tuple[Rule, ...]:
    """Rows of the vision tower of this architecture."""
    table: tuple[Rule, ...] = VISION
    if arch.vision.norm_type == "layer_norm":
        table += VISION_LAYER_NORM
    if arch.vision.qkv_bias:
        table += VISION_QKV_BIAS
    if arch.vision.qk_normalization:
        table += VISION_QK_NORM
    return table
