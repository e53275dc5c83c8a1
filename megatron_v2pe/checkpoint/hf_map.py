"""Hugging Face names <-> our parameter names: one table, read from left to right by import and inverted by code.

A row says: these Hugging Face tensors, of this shape, become this parameter of ours by this transform, or are
dropped for this reason. `{i}` runs over the layers. Sizes in the shape column:

    vision    C hidden, M MLP, P positions (patches + class token), S patch side in pixels
    projector K = C / downsample_ratio^2
    language  H hidden, F MLP, A query rows (heads x head_dim), QKV rows of all kv groups, V vocabulary

Norms, linears and attention carry mcore's names on our side. The state key of a parameter in a checkpoint is its
name here, whatever the parallel layout (see `dist_io.SHARDED_STATE_METADATA`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from megatron_v2pe.checkpoint.transforms import GroupHeads, Same, StackRows, Transform, VocabularyRows
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.core.errors import CheckpointError

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


def vocabulary(arch: InternVLArchitecture) -> Transform:
    """Stored without padding rows."""
    return VocabularyRows(vocab_size=arch.language.vocab_size, padded_size=arch.language.vocab_size)


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        hf: Hugging Face name patterns; several are parts of one parameter of ours, in order.
        ours: our name pattern; empty when the tensors are dropped.
        shape: symbolic shape of each Hugging Face tensor; empty for dropped ones.
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
_L = "language_model.model.layers.{i}."
_LO = "language.decoder.layers.{i}."
INTERNLM2 = (
    Rule(("language_model.model.tok_embeddings.weight",),
                                          "language.embedding.word_embeddings.weight", "V H", vocabulary),
    Rule((_L + "attention_norm.weight",), _LO + "input_layernorm.weight",            "H"),
    Rule((_L + "attention.wqkv.weight",), _LO + "self_attention.linear_qkv.weight",  "QKV H"),
    Rule((_L + "attention.wo.weight",),   _LO + "self_attention.linear_proj.weight", "H A"),
    Rule((_L + "ffn_norm.weight",),       _LO + "pre_mlp_layernorm.weight",          "H"),
    Rule((_L + "feed_forward.w1.weight", _L + "feed_forward.w3.weight"),
                                          _LO + "mlp.linear_fc1.weight",             "F H", gate_up),
    Rule((_L + "feed_forward.w2.weight",), _LO + "mlp.linear_fc2.weight",            "H F"),
    Rule(("language_model.model.norm.weight",), "language.decoder.final_layernorm.weight", "H"),
    Rule(("language_model.output.weight",),     "language.output_layer.weight",      "V H", vocabulary),
    Rule((_L + "attention.rotary_emb.inv_freq",), reason="follows from rope_theta of config.json"),
)
# fmt: on

LANGUAGE_TABLES = {"InternLM2ForCausalLM": INTERNLM2}


@dataclass(frozen=True)
class Entry:
    """A rule with its layer number filled in: the tensors of one parameter of ours."""

    hf: tuple[str, ...]
    ours: str
    hf_shape: tuple[int, ...]
    transform: Transform

    def to_hf(self, stored: Tensor) -> list[Tensor]:
        """The Hugging Face tensors of a stored one, without padding.

        Rows and columns that a run added (vocabulary, heads of a split vision tower) lie behind the real ones.
        """
        if len(self.hf) == 1:
            stored = stored[tuple(slice(size) for size in self.hf_shape)]
        return self.transform.to_hf(stored)


@dataclass(frozen=True)
class NameMap:
    """The table of one architecture.

    Attributes:
        by_ours: our parameter name -> its entry.
        by_hf: Hugging Face tensor name -> the entry it is a part of.
        dropped: pattern of Hugging Face names that are left out -> why.
    """

    by_ours: dict[str, Entry]
    by_hf: dict[str, Entry]
    dropped: dict[re.Pattern[str], str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Numbers in all Hugging Face tensors that are kept."""
        return sum(prod(entry.hf_shape) * len(entry.hf) for entry in self.by_ours.values())

    def drop_reason(self, hf_name: str) -> str:
        """Why a tensor is left out; empty when it is not."""
        return next((why for pattern, why in self.dropped.items() if pattern.fullmatch(hf_name)), "")


def family_name(arch: InternVLArchitecture) -> str:
    """Language and vision family in one word, for reports and `checkpoint.json`."""
    vision = "vit300m" if arch.vision.norm_type == "layer_norm" else "vit6b"
    return f"{arch.language.architecture.removesuffix('ForCausalLM').lower()}_{vision}"


def name_map(arch: InternVLArchitecture) -> NameMap:
    """Fill in the table for an architecture.

    Raises:
        CheckpointError: the table has no rows for this architecture; the message lists the known ones.
    """
    sizes = _sizes(arch)
    entries: list[Entry] = []
    dropped: dict[re.Pattern[str], str] = {}
    for rules, num_layers in _tables(arch):
        for rule in rules:
            if rule.reason:
                patterns = (re.escape(name).replace(r"\{i\}", r"\d+") for name in rule.hf)
                dropped.update({re.compile(pattern): rule.reason for pattern in patterns})
            else:
                entries.extend(_expand(rule, num_layers, sizes, rule.transform(arch)))
    by_hf = {name: entry for entry in entries for name in entry.hf}
    return NameMap(by_ours={entry.ours: entry for entry in entries}, by_hf=by_hf, dropped=dropped)


def _tables(arch: InternVLArchitecture) -> Iterable[tuple[tuple[Rule, ...], int]]:
    language = LANGUAGE_TABLES.get(arch.language.architecture)
    if language is None:
        known = ", ".join(LANGUAGE_TABLES)
        raise CheckpointError(f"no mapping for language model {arch.language.architecture!r}; known: {known}")
    if arch.language.attention_bias or arch.language.tie_word_embeddings:
        raise CheckpointError(
            "no mapping for llm_config.bias or tie_word_embeddings true; InternVL2 has both false"
        )
    yield VISION, arch.vision.num_layers
    if arch.vision.norm_type == "layer_norm":
        yield VISION_LAYER_NORM, arch.vision.num_layers
    if arch.vision.qkv_bias:
        yield VISION_QKV_BIAS, arch.vision.num_layers
    if arch.vision.qk_normalization:
        yield VISION_QK_NORM, arch.vision.num_layers
    yield PROJECTOR, 0
    yield language, arch.language.num_layers


def _sizes(arch: InternVLArchitecture) -> dict[str, int]:
    vision, language = arch.vision, arch.language
    return {
        "C": vision.hidden_size,
        "3C": 3 * vision.hidden_size,
        "M": vision.ffn_size,
        "P": (vision.image_size // vision.patch_size) ** 2 + 1,
        "S": vision.patch_size,
        "K": vision.hidden_size * round(1 / arch.downsample_ratio) ** 2,
        "H": language.hidden_size,
        "F": language.ffn_size,
        "A": language.num_heads * language.head_dim,
        "QKV": (language.num_heads + 2 * language.num_kv_heads) * language.head_dim,
        "V": language.vocab_size,
    }


def _expand(rule: Rule, num_layers: int, sizes: dict[str, int], transform: Transform) -> Iterable[Entry]:
    shape = tuple(sizes[size] if size in sizes else int(size) for size in rule.shape.split())
    for i in range(num_layers) if "{i}" in rule.ours else (0,):
        names = tuple(name.replace("{i}", str(i)) for name in rule.hf)
        yield Entry(hf=names, ours=rule.ours.replace("{i}", str(i)), hf_shape=shape, transform=transform)
