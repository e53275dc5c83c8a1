"""Hugging Face names <-> our parameter names of one architecture: its rows of `config.families`, in one of 3 spellings.

    github            vision_model.*        mlp1.*                         language_model.model.*
    hf-native         vision_tower.*        multi_modal_projector.*        language_model.model.*
    hf-native-nested  model.vision_tower.*  model.multi_modal_projector.*  model.language_model.*

transformers writes either spelling of the native names, that of the folder it loaded; published folders have the first.

The state key of a parameter in a checkpoint is our name, whatever the parallel layout (see
`state.model_state.SHARDED_STATE_METADATA`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Literal

from megatron_v2pe.checkpoint.hf.transforms import GroupHeads, Same, StackRows, Transform, VocabularyRows
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.families import FAMILIES, internvit
from megatron_v2pe.config.arch.families.rules import HEAD, Rule

Spelling = Literal["github", "hf-native", "hf-native-nested"]
"""Which names a folder's tensors have."""

_NESTED = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def spelling_of(arch: InternVLArchitecture, names: Collection[str] = ()) -> Spelling:
    """The spelling of a folder's tensors; without names, that of published folders of its format."""
    if arch.folder_format == "github":
        return "github"
    is_nested = any(name.startswith("model.") for name in names)
    return "hf-native-nested" if is_nested else "hf-native"


def tables(arch: InternVLArchitecture, spelling: Spelling) -> Iterable[tuple[tuple[Rule, ...], int]]:
    """Rows of each part that the architecture has, with the part's number of layers."""
    for rules, num_layers in _tables(arch, is_native=spelling != "github"):
        nested = spelling == "hf-native-nested"
        yield tuple(_nested(rule) for rule in rules) if nested else rules, num_layers


def vision_rules(arch: InternVLArchitecture) -> tuple[Rule, ...]:
    """Rows of the vision tower, under GitHub's names."""
    *vision, _projector, _language_model = _tables(arch, is_native=False)
    return tuple(rule for rules, _ in vision for rule in rules)


def _tables(arch: InternVLArchitecture, *, is_native: bool) -> Iterable[tuple[tuple[Rule, ...], int]]:
    vision, num_layers = arch.vision, arch.vision.num_layers
    yield internvit.NATIVE if is_native else internvit.GITHUB, num_layers
    if vision.norm_type == "layer_norm":
        yield internvit.NATIVE_NORM_BIAS if is_native else internvit.GITHUB_NORM_BIAS, num_layers
    if vision.qkv_bias:
        yield internvit.NATIVE_QKV_BIAS if is_native else internvit.GITHUB_QKV_BIAS, num_layers
    if vision.qk_normalization:
        yield internvit.NATIVE_QK_NORM if is_native else internvit.GITHUB_QK_NORM, num_layers
    projector = internvit.NATIVE_PROJECTOR if is_native else internvit.GITHUB_PROJECTOR
    yield () if arch.reads_all_branches else projector, 0  # a readout in its place has rules of its own
    yield _language(arch, is_native=is_native), arch.language.num_layers


def _language(arch: InternVLArchitecture, *, is_native: bool) -> tuple[Rule, ...]:
    """Rows of the language model. Where head and embedding are tied, a copy in the head's place is dropped."""
    family = FAMILIES[arch.language.architecture]
    rules = family.native_table if is_native else family.github
    if not arch.language.tie_word_embeddings:
        return rules
    tied = "is the embedding (tie_word_embeddings)"
    return tuple(Rule(rule.hf, reason=tied) if rule.ours == HEAD else rule for rule in rules)


def _nested(rule: Rule) -> Rule:
    return replace(rule, hf=tuple(_nested_name(name) for name in rule.hf))


def _nested_name(name: str) -> str:
    for plain, nested in _NESTED:
        if name.startswith(plain):
            return nested + name.removeprefix(plain)
    raise ValueError(f"{name} has no nested spelling")


def transform_of(rule: Rule, arch: InternVLArchitecture) -> Transform:
    """The pair of functions that a rule names, with the sizes of an architecture."""
    language, vision = arch.language, arch.vision
    match rule.transform:
        case "same":
            return Same()
        case "gate_up":
            return StackRows(2)
        case "vocabulary":  # stored without padding rows
            return VocabularyRows(vocab_size=language.vocab_size, padded_size=language.vocab_size)
        case "vision_qkv" | "vision_q_k_v":
            num_heads, head_dim = vision.num_heads, vision.hidden_size // vision.num_heads
            is_fused = rule.transform == "vision_qkv"
            return GroupHeads(
                num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, is_fused=is_fused
            )
        case "language_qkv" | "language_q_k_v":
            return GroupHeads(
                num_heads=language.num_heads,
                num_kv_heads=language.num_kv_heads,
                head_dim=language.head_dim,
                is_fused=rule.transform == "language_qkv",
            )
