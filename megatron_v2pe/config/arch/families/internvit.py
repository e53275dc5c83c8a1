"""InternViT (300M and 6B) and the projector: names in a GitHub folder and in a native one.

Both towers share a class in both formats; which rows are there follows from the configuration.
"""

from megatron_v2pe.config.arch.families.rules import Rule

# fmt: off
_V, _N, _O = "vision_model.encoder.layers.{i}.", "vision_tower.encoder.layer.{i}.", "vision.encoder.layers.{i}."

GITHUB = (
    Rule(("vision_model.embeddings.class_embedding",),        "vision.class_embedding",        "1 1 C"),
    Rule(("vision_model.embeddings.position_embedding",),     "vision.position_embedding",     "1 P C"),
    Rule(("vision_model.embeddings.patch_embedding.weight",), "vision.patch_embedding.weight", "C 3 S S"),
    Rule(("vision_model.embeddings.patch_embedding.bias",),   "vision.patch_embedding.bias",   "C"),
    Rule((_V + "norm1.weight",),     _O + "input_layernorm.weight",            "C"),
    Rule((_V + "attn.qkv.weight",),  _O + "self_attention.linear_qkv.weight",  "3C C", "vision_qkv"),
    Rule((_V + "attn.proj.weight",), _O + "self_attention.linear_proj.weight", "C C"),
    Rule((_V + "attn.proj.bias",),   _O + "self_attention.linear_proj.bias",   "C"),
    Rule((_V + "ls1",),              _O + "ls1",                               "C"),
    Rule((_V + "norm2.weight",),     _O + "pre_mlp_layernorm.weight",          "C"),
    Rule((_V + "mlp.fc1.weight",),   _O + "mlp.linear_fc1.weight",             "M C"),
    Rule((_V + "mlp.fc1.bias",),     _O + "mlp.linear_fc1.bias",               "M"),
    Rule((_V + "mlp.fc2.weight",),   _O + "mlp.linear_fc2.weight",             "C M"),
    Rule((_V + "mlp.fc2.bias",),     _O + "mlp.linear_fc2.bias",               "C"),
    Rule((_V + "ls2",),              _O + "ls2",                               "C"),
)
GITHUB_NORM_BIAS = (  # InternViT-300M; RMSNorm has no bias
    Rule((_V + "norm1.bias",), _O + "input_layernorm.bias",   "C"),
    Rule((_V + "norm2.bias",), _O + "pre_mlp_layernorm.bias", "C"),
)
GITHUB_QKV_BIAS = (  # InternViT-300M
    Rule((_V + "attn.qkv.bias",), _O + "self_attention.linear_qkv.bias", "3C", "vision_qkv"),
)
GITHUB_QK_NORM = (  # InternViT-6B: over the full width, before the split into heads
    Rule((_V + "attn.q_norm.weight",), _O + "self_attention.q_norm.weight", "C"),
    Rule((_V + "attn.k_norm.weight",), _O + "self_attention.k_norm.weight", "C"),
)
GITHUB_PROJECTOR = (
    Rule(("mlp1.0.weight",), "projector.norm.weight",           "K"),
    Rule(("mlp1.0.bias",),   "projector.norm.bias",             "K"),
    Rule(("mlp1.1.weight",), "projector.mlp.linear_fc1.weight", "H K"),
    Rule(("mlp1.1.bias",),   "projector.mlp.linear_fc1.bias",   "H"),
    Rule(("mlp1.3.weight",), "projector.mlp.linear_fc2.weight", "H H"),
    Rule(("mlp1.3.bias",),   "projector.mlp.linear_fc2.bias",   "H"),
)

_PATCHES = "vision_tower.embeddings.patch_embeddings.projection."
NATIVE = (
    Rule(("vision_tower.embeddings.cls_token",),           "vision.class_embedding",        "1 1 C"),
    Rule(("vision_tower.embeddings.position_embeddings",), "vision.position_embedding",     "1 P C"),
    Rule((_PATCHES + "weight",),                           "vision.patch_embedding.weight", "C 3 S S"),
    Rule((_PATCHES + "bias",),                             "vision.patch_embedding.bias",   "C"),
    Rule((_N + "layernorm_before.weight",), _O + "input_layernorm.weight",             "C"),
    Rule((_N + "attention.q_proj.weight", _N + "attention.k_proj.weight", _N + "attention.v_proj.weight"),
                                            _O + "self_attention.linear_qkv.weight",   "C C", "vision_q_k_v"),
    Rule((_N + "attention.projection_layer.weight",), _O + "self_attention.linear_proj.weight", "C C"),
    Rule((_N + "attention.projection_layer.bias",),   _O + "self_attention.linear_proj.bias",   "C"),
    Rule((_N + "lambda_1",),                _O + "ls1",                                "C"),
    Rule((_N + "layernorm_after.weight",),  _O + "pre_mlp_layernorm.weight",           "C"),
    Rule((_N + "mlp.fc1.weight",),          _O + "mlp.linear_fc1.weight",              "M C"),
    Rule((_N + "mlp.fc1.bias",),            _O + "mlp.linear_fc1.bias",                "M"),
    Rule((_N + "mlp.fc2.weight",),          _O + "mlp.linear_fc2.weight",              "C M"),
    Rule((_N + "mlp.fc2.bias",),            _O + "mlp.linear_fc2.bias",                "C"),
    Rule((_N + "lambda_2",),                _O + "ls2",                                "C"),
)
NATIVE_NORM_BIAS = (
    Rule((_N + "layernorm_before.bias",), _O + "input_layernorm.bias",   "C"),
    Rule((_N + "layernorm_after.bias",),  _O + "pre_mlp_layernorm.bias", "C"),
)
NATIVE_QKV_BIAS = (
    Rule((_N + "attention.q_proj.bias", _N + "attention.k_proj.bias", _N + "attention.v_proj.bias"),
         _O + "self_attention.linear_qkv.bias", "C", "vision_q_k_v"),
)
NATIVE_QK_NORM = (  # the official converter drops these two
    Rule((_N + "attention.q_norm.weight",), _O + "self_attention.q_norm.weight", "C"),
    Rule((_N + "attention.k_norm.weight",), _O + "self_attention.k_norm.weight", "C"),
)
NATIVE_PROJECTOR = (
    Rule(("multi_modal_projector.layer_norm.weight",), "projector.norm.weight",           "K"),
    Rule(("multi_modal_projector.layer_norm.bias",),   "projector.norm.bias",             "K"),
    Rule(("multi_modal_projector.linear_1.weight",),   "projector.mlp.linear_fc1.weight", "H K"),
    Rule(("multi_modal_projector.linear_1.bias",),     "projector.mlp.linear_fc1.bias",   "H"),
    Rule(("multi_modal_projector.linear_2.weight",),   "projector.mlp.linear_fc2.weight", "H H"),
    Rule(("multi_modal_projector.linear_2.bias",),     "projector.mlp.linear_fc2.bias",   "H"),
)
# fmt: on
