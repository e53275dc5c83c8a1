"""Hugging Face names <-> our parameter names: one table for each family, read from left to right by import.

A row says: these Hugging Face tensors, of this shape, become this parameter of ours by this transform, or are
dropped for this reason. `{i}` runs over the layers. Sizes in the shape column; parts of different shapes are
separated by a bar:

    vision    C hidden, M MLP, P positions (patches + class token), S patch side in pixels
    projector K = C / downsample_ratio^2
    language  H hidden, F MLP, A query rows (heads x head_dim), B key rows = value rows (kv heads x head_dim),
              QKV = A + 2 B, V vocabulary

Norms, linears and attention carry mcore's names on our side. The state key of a parameter in a checkpoint is its
name here, whatever the parallel layout (see `dist_io.SHARDED_STATE_METADATA`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_v2pe.checkpoint.hf.transforms import GroupHeads, Same, StackRows, Transform, VocabularyRows
from megatron_v2pe.config.architecture import InternVLArchitecture

TransformOf = Callable[[InternVLArchitecture], Transform]


def same(arch: InternVLArchitecture) -> Transform:
    """Copied as it is."""
    return Same()


def gate_up(arch: InternVLArchitecture) -> Transform:
    """Gate rows, then up rows."""
    return StackRows(2)


def vision_heads(arch: InternVLArchitecture) -> Transform:
    """[q | k | v] to [q, k, v] per head; InternLM2's `wqkv` is grouped already and needs nothing."""
    heads = arch.vision.num_heads
    return GroupHeads(num_heads=heads, num_kv_heads=heads, head_dim=arch.vision.hidden_size // heads)


def language_heads(arch: InternVLArchitecture) -> Transform:
    """[q | k | v], in one tensor, to rows per kv group (Phi-3)."""
    return _language_heads(arch, is_fused=True)


def separate_language_heads(arch: InternVLArchitecture) -> Transform:
    """q, k and v, each in a tensor of its own, to rows per kv group (Qwen2, Llama)."""
    return _language_heads(arch, is_fused=False)


def _language_heads(arch: InternVLArchitecture, *, is_fused: bool) -> Transform:
    language = arch.language
    return GroupHeads(
        num_heads=language.num_heads,
        num_kv_heads=language.num_kv_heads,
        head_dim=language.head_dim,
        is_fused=is_fused,
    )


def vocabulary(arch: InternVLArchitecture) -> Transform:
    """Stored without padding rows."""
    return VocabularyRows(vocab_size=arch.language.vocab_size, padded_size=arch.language.vocab_size)


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        hf: Hugging Face name patterns; several are parts of one parameter of ours, in order.
        ours: our name pattern; empty when the tensors are dropped.
        shape: symbolic shape of the Hugging Face tensors; empty for dropped ones.
        transform: builds the transform for an architecture.
        reason: why the tensors are dropped.
    """

    hf: tuple[str, ...]
    ours: str = ""
    shape: str = ""
    transform: TransformOf = same
    reason: str = ""


# fmt: off
_V = "vision_model.encoder.layers.{i}."
_VO = "vision.encoder.layers.{i}."
VISION = (
    Rule(("vision_model.embeddings.class_embedding",),        "vision.class_embedding",        "1 1 C"),
    Rule(("vision_model.embeddings.position_embedding",),     "vision.position_embedding",     "1 P C"),
    Rule(("vision_model.embeddings.patch_embedding.weight",), "vision.patch_embedding.weight", "C 3 S S"),
    Rule(("vision_model.embeddings.patch_embedding.bias",),   "vision.patch_embedding.bias",   "C"),
    Rule((_V + "norm1.weight",),     _VO + "input_layernorm.weight",            "C"),
    Rule((_V + "attn.qkv.weight",),  _VO + "self_attention.linear_qkv.weight",  "3C C", vision_heads),
    Rule((_V + "attn.proj.weight",), _VO + "self_attention.linear_proj.weight", "C C"),
    Rule((_V + "attn.proj.bias",),   _VO + "self_attention.linear_proj.bias",   "C"),
    Rule((_V + "ls1",),              _VO + "ls1",                               "C"),
    Rule((_V + "norm2.weight",),     _VO + "pre_mlp_layernorm.weight",          "C"),
    Rule((_V + "mlp.fc1.weight",),   _VO + "mlp.linear_fc1.weight",             "M C"),
    Rule((_V + "mlp.fc1.bias",),     _VO + "mlp.linear_fc1.bias",               "M"),
    Rule((_V + "mlp.fc2.weight",),   _VO + "mlp.linear_fc2.weight",             "C M"),
    Rule((_V + "mlp.fc2.bias",),     _VO + "mlp.linear_fc2.bias",               "C"),
    Rule((_V + "ls2",),              _VO + "ls2",                               "C"),
)
VISION_LAYER_NORM = (  # InternViT-300M; RMSNorm has no bias
    Rule((_V + "norm1.bias",),       _VO + "input_layernorm.bias",              "C"),
    Rule((_V + "norm2.bias",),       _VO + "pre_mlp_layernorm.bias",            "C"),
)
VISION_QKV_BIAS = (  # InternViT-300M
    Rule((_V + "attn.qkv.bias",),    _VO + "self_attention.linear_qkv.bias",    "3C", vision_heads),
)
VISION_QK_NORM = (  # InternViT-6B: over the full width, before the split into heads
    Rule((_V + "attn.q_norm.weight",), _VO + "self_attention.q_norm.weight",    "C"),
    Rule((_V + "attn.k_norm.weight",), _VO + "self_attention.k_norm.weight",    "C"),
)
PROJECTOR = (
    Rule(("mlp1.0.weight",), "projector.norm.weight",           "K"),
    Rule(("mlp1.0.bias",),   "projector.norm.bias",             "K"),
    Rule(("mlp1.1.weight",), "projector.mlp.linear_fc1.weight", "H K"),
    Rule(("mlp1.1.bias",),   "projector.mlp.linear_fc1.bias",   "H"),
    Rule(("mlp1.3.weight",), "projector.mlp.linear_fc2.weight", "H H"),
    Rule(("mlp1.3.bias",),   "projector.mlp.linear_fc2.bias",   "H"),
)
_HEAD = "language.output_layer.weight"
_EMBEDDING = "language.embedding.word_embeddings.weight"
_NORM = "language.decoder.final_layernorm.weight"
_ROTARY = "follows from rope_theta and rope_scaling of config.json"
_L = "language_model.model.layers.{i}."
_LO = "language.decoder.layers.{i}."
INTERNLM2 = (
    Rule(("language_model.model.tok_embeddings.weight",), _EMBEDDING, "V H", vocabulary),
    Rule((_L + "attention_norm.weight",), _LO + "input_layernorm.weight",            "H"),
    Rule((_L + "attention.wqkv.weight",), _LO + "self_attention.linear_qkv.weight",  "QKV H"),
    Rule((_L + "attention.wo.weight",),   _LO + "self_attention.linear_proj.weight", "H A"),
    Rule((_L + "ffn_norm.weight",),       _LO + "pre_mlp_layernorm.weight",          "H"),
    Rule((_L + "feed_forward.w1.weight", _L + "feed_forward.w3.weight"),
                                          _LO + "mlp.linear_fc1.weight",             "F H", gate_up),
    Rule((_L + "feed_forward.w2.weight",), _LO + "mlp.linear_fc2.weight",            "H F"),
    Rule(("language_model.model.norm.weight",), _NORM,                               "H"),
    Rule(("language_model.output.weight",),     _HEAD,                               "V H", vocabulary),
    Rule((_L + "attention.rotary_emb.inv_freq",), reason=_ROTARY),
)
_LLAMA_LIKE = (  # what Llama, Qwen2 and Phi-3 name alike
    Rule(("language_model.model.embed_tokens.weight",), _EMBEDDING, "V H", vocabulary),
    Rule((_L + "input_layernorm.weight",),          _LO + "input_layernorm.weight",            "H"),
    Rule((_L + "self_attn.o_proj.weight",),         _LO + "self_attention.linear_proj.weight", "H A"),
    Rule((_L + "post_attention_layernorm.weight",), _LO + "pre_mlp_layernorm.weight",          "H"),
    Rule((_L + "mlp.down_proj.weight",),            _LO + "mlp.linear_fc2.weight",             "H F"),
    Rule(("language_model.model.norm.weight",),     _NORM,                                     "H"),
    Rule(("language_model.lm_head.weight",),        _HEAD,                                     "V H", vocabulary),
    Rule((_L + "self_attn.rotary_emb.inv_freq", "language_model.model.rotary_emb.inv_freq"), reason=_ROTARY),
)
LLAMA = (
    *_LLAMA_LIKE,
    Rule((_L + "self_attn.q_proj.weight", _L + "self_attn.k_proj.weight", _L + "self_attn.v_proj.weight"),
         _LO + "self_attention.linear_qkv.weight", "A H | B H | B H", separate_language_heads),
    Rule((_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"),
         _LO + "mlp.linear_fc1.weight",            "F H", gate_up),
)
QWEN2 = (
    *LLAMA,
    Rule((_L + "self_attn.q_proj.bias", _L + "self_attn.k_proj.bias", _L + "self_attn.v_proj.bias"),
         _LO + "self_attention.linear_qkv.bias",   "A | B | B", separate_language_heads),
)
PHI3 = (
    *_LLAMA_LIKE,
    Rule((_L + "self_attn.qkv_proj.weight",), _LO + "self_attention.linear_qkv.weight", "QKV H", language_heads),
    Rule((_L + "mlp.gate_up_proj.weight",),   _LO + "mlp.linear_fc1.weight",            "2F H"),
)
# fmt: on

LANGUAGE_TABLES = {
    "InternLM2ForCausalLM": INTERNLM2,
    "Qwen2ForCausalLM": QWEN2,
    "LlamaForCausalLM": LLAMA,
    "Phi3ForCausalLM": PHI3,
}


def language_table(arch: InternVLArchitecture) -> tuple[Rule, ...]:
    """Rows of the language model. Where head and embedding are tied, a copy in the head's place is dropped."""
    rules = LANGUAGE_TABLES[arch.language.architecture]
    if not arch.language.tie_word_embeddings:
        return rules
    tied = "is the embedding (tie_word_embeddings)"
    return tuple(Rule(rule.hf, reason=tied) if rule.ours == _HEAD else rule for rule in rules)
