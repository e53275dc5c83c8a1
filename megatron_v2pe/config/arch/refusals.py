"""What a config.json may say that no InternVL is: refused by name before a weight is read.

Two ways in which a model is almost one that is known: a known class with an option of it set (`fixed` of its family,
windows, biases), and a known class with a key of another decoder, as a derived model has. Tensors that a table does
not have are found by name when the folder is opened (`checkpoint.convert.hf_source`); the keys below change numbers
without a tensor of their own.
"""

from __future__ import annotations

from typing import Any

from megatron_v2pe.config.arch.families import LanguageFamily
from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened

_NOTHING: tuple[Any, ...] = (False, 0)
_OF_OTHER_DECODERS: dict[str, tuple[Any, ...]] = {
    # norms
    **dict.fromkeys(("norm_type", "normalization_type"), ("rms_norm", "rmsnorm", "RMSNorm")),
    **dict.fromkeys(("sandwich_norm", "post_norm", "use_post_norm", "scale_depth"), _NOTHING),
    # activations and gates
    "hidden_activation": ("silu",),
    **dict.fromkeys(("attn_output_gate", "swiglu_limit", "swiglu_alpha", "clip_qkv"), _NOTHING),
    # attention
    **dict.fromkeys(("alibi", "use_alibi", "parallel_attn", "use_parallel_residual"), _NOTHING),
    **dict.fromkeys(("attn_logit_softcapping", "attn_logit_softcap", "query_pre_attn_scalar"), _NOTHING),
    **dict.fromkeys(("attention_multiplier", "attention_chunk_size", "use_attention_sinks"), _NOTHING),
    # rotation
    **dict.fromkeys(("rotary_pct", "rotary_percent"), (1.0,)),
    **dict.fromkeys(
        ("no_rope_layers", "no_rope_layer_interval", "rope_interleave", "mrope_section"), _NOTHING
    ),
    # scales
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "scale_emb"), (1.0,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier"), (1.0,)),
    **dict.fromkeys(("final_logit_softcapping", "final_logit_softcap"), _NOTHING),
    # experts
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"), _NOTHING),
    **dict.fromkeys(("n_routed_experts", "first_k_dense_replace"), _NOTHING),
    "scoring_func": ("softmax",),
    **dict.fromkeys(("n_group", "topk_group"), (1,)),
    "routed_scaling_factor": (1.0,),
}
"""Key of another decoder -> values of it that change nothing; null and an empty list count as absent."""

_OF_CLAMPED_EXPERTS: dict[str, tuple[Any, ...]] = {
    # GPT-OSS: experts in every layer, of `intermediate_size`, weighted by the softmax of the chosen logits
    **dict.fromkeys(("mlp_only_layers", "moe_intermediate_size"), _NOTHING),
    "decoder_sparse_step": (1,),
    "norm_topk_prob": (True,),
}

_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")


def refuse_flash(top: Section) -> None:
    """InternVL3.5-Flash chooses 256 or 64 tokens for each tile by a router of its own.

    Raises:
        CheckpointError: a key of it is set.
    """
    for key in ("flash_relative_threshold", "flash_absolute_threshold", "use_vision_router", "vision_router"):
        if top.get(key, None):
            raise CheckpointError(
                f"{top.path}: {key} is set, so this is an InternVL-Flash, whose tiles have 64 or 256 tokens by the "
                "choice of a router; take the plain InternVL3.5 of the same size"
            )


def refuse_variants(language: Section, family: LanguageFamily) -> None:
    """Refuse what these classes, or classes derived from them, can have and no InternVL has.

    Raises:
        CheckpointError: names the key, its value, and the values that are computed.
    """
    language.choice("hidden_act", "silu", ("silu",))
    for key, value in family.fixed.items():
        language.choice(key, value, (value,))
    language.choice("partial_rotary_factor", 1.0, (1.0,))
    if not family.alternates_windows:
        _refuse_windows(language, family)
    _refuse_other_decoders(language, family)


def refuse_nulls(language: Section, family: LanguageFamily) -> None:
    """Refuse a null where the class has a rotation or a window of its own.

    transformers 4 computes plain frequencies then, and 5 the class's default; nobody can know which was trained.

    Raises:
        CheckpointError: names the key.
    """
    values = language.values
    for key, instead in (("rope_scaling", "rope_parameters"), ("sliding_window", "")):
        is_null = key in values and values[key] is None and values.get(instead) is None
        if is_null and key in family.class_defaults:
            raise CheckpointError(
                f"{language.path}: {key} is null, which versions of transformers read differently for "
                f"{family.architecture}; write its value, or leave the key out for the class's default "
                f"({family.class_defaults[key]})"
            )


def _refuse_windows(language: Section, family: LanguageFamily) -> None:
    longest = int(language.get("max_position_embeddings", 2048))
    has_window = language.get("use_sliding_window", family.always_windowed)
    window = language.get("sliding_window", longest) if has_window else longest
    if window < longest:
        raise CheckpointError(
            f"{language.path}: sliding_window is {window}, shorter than max_position_embeddings {longest}; attention "
            "here always sees the whole document, so this checkpoint would give other numbers"
        )
    others = sorted(set(language.get("layer_types", ())) - {"full_attention"})
    if others:
        raise CheckpointError(
            f"{language.path}: layer_types has {', '.join(others)}; every layer here attends to the whole document"
        )


def _refuse_other_decoders(language: Section, family: LanguageFamily) -> None:
    own = _OF_CLAMPED_EXPERTS if family.clamped_experts else {}
    for key, neutral in {**_OF_OTHER_DECODERS, **own}.items():
        value = language.values.get(key)
        if key in family.fixed or key in family.class_defaults:
            continue
        if value is None or value == [] or value in neutral:
            continue
        raise CheckpointError(
            f"{language.path}: {key} is {shortened(value)}, which {family.architecture} here does not compute; known "
            f"values are {', '.join(map(repr, neutral))}, or no such key"
        )
    for key in () if family.experts else _EXPERTS:
        if language.get(key, 0):
            raise CheckpointError(
                f"{language.path}: {key} is {shortened(language.get(key, 0))}, but {family.architecture} has one MLP "
                "in each layer; Qwen3MoeForCausalLM is the class with experts"
            )


def refuse_vision_variants(vision: Section) -> None:
    """Refuse towers that differ from InternViT without a tensor that would show it.

    Raises:
        CheckpointError: names the key and its value.
    """
    vision.choice("hidden_act", "gelu", ("gelu",))
    vision.choice("num_channels", 3, (3,))
