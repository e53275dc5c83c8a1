"""Every parameter of a model chunk, in the order in which mcore meets them, as (name, numbers): exact.

    vision      class and position embedding, patch convolution, layers (ls1 ls2 norm proj qkv norm fc1 fc2)
    projector   norm, fc1, fc2
    language    embedding, layers (norm proj qkv norm fc1 fc2), final norm, head

A tensor parallel rank holds 1/tp of every linear and of embedding and head, and norms and output biases whole.
Adapters follow their linear. The order is that of `named_parameters`; it decides where mcore's gradient buffer has
gaps. `planner_check.py` builds the real ranks without memory and compares every name and number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

from megatron_v2pe.config.arch.architecture import (
    InternVLArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_v2pe.config.schema import LoRAConfig
from megatron_v2pe.parallel.plan import ParallelPlan, padded_vocab_size
from megatron_v2pe.planning.memory.adapters import (
    NO_ADAPTERS,
    NO_LORA,
    Adapters,
    ParameterSize,
    planned_adapters,
)
from megatron_v2pe.planning.request.stages import ModelChunk

EXPERTS, LOCAL_EXPERTS = "experts", "experts.local_experts"


def linear(
    name: str, *, rows: int, columns: int, bias: bool, adapters: Adapters = NO_ADAPTERS
) -> Iterator[ParameterSize]:
    """Weight [rows, columns], bias [rows], and adapters of the linear's role; sizes are this rank's."""
    yield f"{name}.weight", rows * columns
    if bias:
        yield f"{name}.bias", rows
    yield from adapters.parameters(name, rows=rows, columns=columns)


def norm(name: str, *, width: int, bias: bool) -> Iterator[ParameterSize]:
    """Weight, and the bias that LayerNorm has and RMSNorm has not."""
    yield f"{name}.weight", width
    if bias:
        yield f"{name}.bias", width


def tower_heads(vision: VisionArchitecture, tower_tp: int) -> int:
    """Heads of the whole tower, rounded up so that they divide by the ranks it is split over."""
    return -(-vision.num_heads // tower_tp) * tower_tp


def vision_layer_parameters(
    name: str, vision: VisionArchitecture, tower_tp: int, adapters: Adapters = NO_ADAPTERS
) -> Iterator[ParameterSize]:
    """One layer of the tower on one of `tower_tp` ranks."""
    hidden, is_layer_norm = vision.hidden_size, vision.norm_type == "layer_norm"
    width = tower_heads(vision, tower_tp) * (hidden // vision.num_heads) // tower_tp
    yield f"{name}.ls1", hidden
    yield f"{name}.ls2", hidden
    yield from norm(f"{name}.input_layernorm", width=hidden, bias=is_layer_norm)
    attention = f"{name}.self_attention"
    yield from linear(f"{attention}.linear_proj", rows=hidden, columns=width, bias=True, adapters=adapters)
    yield from linear(
        f"{attention}.linear_qkv", rows=3 * width, columns=hidden, bias=vision.qkv_bias, adapters=adapters
    )
    if vision.qk_normalization:
        for side in ("q_norm", "k_norm"):
            yield from norm(f"{attention}.{side}", width=width, bias=is_layer_norm)
    yield from norm(f"{name}.pre_mlp_layernorm", width=hidden, bias=is_layer_norm)
    ffn = vision.ffn_size // tower_tp
    mlp = f"{name}.mlp"
    yield from linear(f"{mlp}.linear_fc1", rows=ffn, columns=hidden, bias=True, adapters=adapters)
    yield from linear(f"{mlp}.linear_fc2", rows=hidden, columns=ffn, bias=True, adapters=adapters)


def vision_parameters(
    arch: InternVLArchitecture, tower_tp: int, adapters: Adapters
) -> Iterator[ParameterSize]:
    """The tower, with its pyramid where it has one. Position tables are made for `image_size` of each branch."""
    yield from _internvit_parameters("vision", arch.vision, tower_tp, adapters)
    for index, branch in enumerate(arch.pyramid.branches if arch.pyramid else ()):
        yield from _internvit_parameters(f"vision.branches.{index}", branch, tower_tp, NO_ADAPTERS)
    if arch.pyramid is None:
        return
    from megatron_v2pe.checkpoint.hf.pyramid_table import (
        interaction_rules,  # needs torch, planning else does not
    )

    for rule in interaction_rules(arch):
        yield rule.ours, _size(rule.shape)


def _size(shape: str) -> int:
    """Numbers of a tensor whose shape a rule spells out."""
    return prod(int(size) for size in shape.split())


def _internvit_parameters(
    name: str, vision: VisionArchitecture, tower_tp: int, adapters: Adapters
) -> Iterator[ParameterSize]:
    yield f"{name}.class_embedding", vision.hidden_size
    yield f"{name}.position_embedding", vision.num_positions * vision.hidden_size
    yield from linear(
        f"{name}.patch_embedding", rows=vision.hidden_size, columns=3 * vision.patch_size**2, bias=True
    )
    for index in range(vision.num_layers):
        yield from vision_layer_parameters(f"{name}.encoder.layers.{index}", vision, tower_tp, adapters)


def projector_parameters(
    arch: InternVLArchitecture, tower_tp: int, adapters: Adapters
) -> Iterator[ParameterSize]:
    """LayerNorm over 1 / ratio^2 patches, two linears; or a pyramid's readout, whole on every rank."""
    if arch.reads_all_branches:
        from megatron_v2pe.checkpoint.hf.pyramid_table import (
            readout_rules,  # needs torch, planning else does not
        )

        yield from ((rule.ours, _size(rule.shape)) for rule in readout_rules(arch))
        return
    channels, hidden = arch.projector_width, arch.language.hidden_size
    yield from norm("projector.norm", width=channels, bias=True)
    share, fc1, fc2 = hidden // tower_tp, "projector.mlp.linear_fc1", "projector.mlp.linear_fc2"
    yield from linear(fc1, rows=share, columns=channels, bias=True, adapters=adapters)
    yield from linear(fc2, rows=hidden, columns=share, bias=True, adapters=adapters)


def expert_parameters(
    name: str, language: LanguageArchitecture, plan: ParallelPlan
) -> Iterator[ParameterSize]:
    """Router, whole, and this rank's experts, each split over etp ranks."""
    assert language.experts is not None
    experts, hidden = language.experts, language.hidden_size
    ffn = experts.ffn_size // plan.etp
    local_experts = experts.num_experts // plan.ep
    yield f"{name}.router.weight", experts.num_experts * hidden
    if experts.is_clamped:  # all experts of the rank in one tensor
        yield f"{name}.router.bias", experts.num_experts
        yield f"{name}.{EXPERTS}.gate_up_proj", local_experts * hidden * 2 * ffn
        yield f"{name}.{EXPERTS}.gate_up_proj_bias", local_experts * 2 * ffn
        yield f"{name}.{EXPERTS}.down_proj", local_experts * ffn * hidden
        yield f"{name}.{EXPERTS}.down_proj_bias", local_experts * hidden
        return
    for expert in range(local_experts):
        local = f"{name}.{LOCAL_EXPERTS}.{expert}"
        yield from linear(f"{local}.linear_fc1", rows=2 * ffn, columns=hidden, bias=False)
        yield from linear(f"{local}.linear_fc2", rows=hidden, columns=ffn, bias=False)


def is_expert(parameter: str) -> bool:
    """Whether a parameter belongs to an expert, whose gradients and state have a data parallel group of their own."""
    return f".{EXPERTS}." in parameter


def language_layer_parameters(
    name: str,
    language: LanguageArchitecture,
    plan: ParallelPlan,
    adapters: Adapters = NO_ADAPTERS,
    *,
    is_sparse: bool = False,
) -> Iterator[ParameterSize]:
    """One decoder layer on one rank."""
    tp = plan.tp
    hidden, head_dim = language.hidden_size, language.head_dim
    queries = language.num_heads * head_dim // tp
    keys_and_values = 2 * language.num_kv_heads * head_dim // tp
    ffn = language.ffn_size // tp
    yield f"{name}.input_layernorm.weight", hidden
    attention = f"{name}.self_attention"
    if language.sinks:
        yield f"{attention}.core_attention.softmax_offset", language.num_heads // tp
    yield from linear(
        f"{attention}.linear_proj", rows=hidden, columns=queries, bias=language.proj_bias, adapters=adapters
    )
    mixed = queries + keys_and_values
    yield from linear(
        f"{attention}.linear_qkv", rows=mixed, columns=hidden, bias=language.qkv_bias, adapters=adapters
    )
    if language.qk_norm:
        yield f"{attention}.q_layernorm.weight", head_dim
        yield f"{attention}.k_layernorm.weight", head_dim
    yield f"{name}.pre_mlp_layernorm.weight", hidden
    mlp = f"{name}.mlp"
    if is_sparse:
        yield from expert_parameters(mlp, language, plan)
        return
    yield from linear(f"{mlp}.linear_fc1", rows=2 * ffn, columns=hidden, bias=False, adapters=adapters)
    yield from linear(f"{mlp}.linear_fc2", rows=hidden, columns=ffn, bias=False, adapters=adapters)


def language_parameters(
    arch: InternVLArchitecture, plan: ParallelPlan, model_chunk: ModelChunk, adapters: Adapters
) -> Iterator[ParameterSize]:
    """This model chunk's part of the decoder. A tied head is a second copy where it is on another stage."""
    language = arch.language
    vocab_rows = padded_vocab_size(language.vocab_size, plan.tp) // plan.tp * language.hidden_size
    if model_chunk.is_first:
        yield "language.embedding.word_embeddings.weight", vocab_rows
    for index in range(model_chunk.num_layers):
        is_sparse = language.is_sparse(model_chunk.first_layer + index)
        name = f"language.decoder.layers.{index}"
        yield from language_layer_parameters(name, language, plan, adapters, is_sparse=is_sparse)
    if model_chunk.is_last:
        yield "language.decoder.final_layernorm.weight", language.hidden_size
        if not (language.tie_word_embeddings and model_chunk.is_first):
            yield "language.output_layer.weight", vocab_rows


@lru_cache(maxsize=256)  # asked for several times in an estimate, and again for the next one of a search
def model_chunk_parameters(
    arch: InternVLArchitecture, plan: ParallelPlan, model_chunk: ModelChunk, lora: LoRAConfig = NO_LORA
) -> tuple[ParameterSize, ...]:
    """All parameters of a model chunk."""
    parameters: list[ParameterSize] = []
    if model_chunk.is_first:
        parameters += vision_parameters(arch, plan.tower_tp, planned_adapters(lora, "vision", arch))
        parameters += projector_parameters(arch, plan.tower_tp, planned_adapters(lora, "projector", arch))
    language = planned_adapters(lora, "language", arch)
    return (*parameters, *language_parameters(arch, plan, model_chunk, language))
