"""Build this rank's part of the model. The order of `build_model` is the whole parallel recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from megatron.core.tensor_parallel.layers import (
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_v2pe.assembly.adapters import PartSplit, adapted_modules
from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.assembly.mcore_config import (
    language_config,
    projector_config,
    rope_spec,
    vision_config,
)
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.fp8 import FP8_MULTIPLE
from megatron_v2pe.config.lora import PARTS, Part, is_adapter_parameter, parts_trained_whole
from megatron_v2pe.config.schema import ModelConfig, RunConfig
from megatron_v2pe.config.sections.parts import is_in
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.models.language import LanguageModel
from megatron_v2pe.models.layers.elementwise import ElementwiseOps
from megatron_v2pe.models.layers.experts import ExpertRouter, RouterSettings
from megatron_v2pe.models.layers.layer_specs import BackendModules, with_clamped_experts, with_proj_bias
from megatron_v2pe.models.layers.norms import SplitRMSNorm
from megatron_v2pe.models.loss import HeadPorts
from megatron_v2pe.models.memory import MemorySavings
from megatron_v2pe.models.offload import ActivationOffload
from megatron_v2pe.models.piip.interaction import InteractionSettings
from megatron_v2pe.models.piip.readout import PyramidReadout
from megatron_v2pe.models.piip.tower import PyramidTower
from megatron_v2pe.models.projector import Projector
from megatron_v2pe.models.vision import InternViT
from megatron_v2pe.parallel.feature_router import FeatureRouter
from megatron_v2pe.parallel.plan import padded_vocab_size
from megatron_v2pe.parallel.topology import ParallelContext


def build_model(config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> list[InternVL]:
    """Build this rank's model chunks, without weights; the caller loads a checkpoint into them.

    Args:
        config: the run.
        arch: architecture of the checkpoint.
        context: sizes of the parallel axes and this rank's place on them.

    Returns:
        One model chunk for each virtual pipeline stage of this rank, one without virtual stages; on the rank's device.

    Raises:
        ConfigError: the back end or an option of memory that the run asks for does not exist on this host.
    """
    plan, ranks = context.plan, context.ranks
    plain = choose_modules(
        config.parallel, dtype=config.runtime.dtype, fp8=config.model.fp8, sinks=arch.language.sinks
    )
    modules = {part: part_modules(plain, part, config, arch, context) for part in PARTS}
    decoder_config = language_config(config, arch, plan)
    elementwise = choose_elementwise(config.runtime)
    model_chunks = []
    for stage in stages_of_rank(context):
        language = _build_language(
            config, arch, decoder_config, modules["language"], elementwise, context, stage
        )
        vision, projector = None, None
        if stage.pre_process:
            vision = build_vision(config, arch, modules["vision"], elementwise, context, plain_modules=plain)
            projector = build_projector(config, arch, modules["projector"], elementwise, context)
        model_chunk = InternVL(
            decoder_config,
            vision=vision,
            projector=projector,
            language=language,
            tile_sizes=arch.tile_sizes,
            micro_batch_tiles=config.vision.micro_batch_tiles,
            tile_multiple=config.vision.tile_multiple,
            route_features=FeatureRouter(ranks.tile_group, ranks.groups.tp),
            replica_group=ranks.vision_replica_group if plan.vision == "replicated" else None,
        )
        # mcore's and Transformer Engine's modules are on the GPU already; our norms, embeddings and scales are not.
        model_chunks.append(model_chunk.to(ranks.device))
    freeze(model_chunks, config)
    return model_chunks


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one model chunk of this rank owns; data, no communication.

    Attributes:
        pre_process: vision tower, projector and embedding.
        post_process: head and loss.
        vp_stage: number of the virtual stage, None without them.
    """

    pre_process: bool
    post_process: bool
    vp_stage: int | None


def stages_of_rank(context: ParallelContext) -> list[Stage]:
    """Stages of this pipeline rank: virtual stage v of rank r is stage v * pp + r of the whole pipeline."""
    vpp, ranks = context.plan.vpp, context.ranks
    return [
        Stage(
            pre_process=ranks.is_first_stage and virtual == 0,
            post_process=ranks.is_last_stage and virtual == vpp - 1,
            vp_stage=virtual if vpp > 1 else None,
        )
        for virtual in range(vpp)
    ]


def _build_language(
    config: RunConfig,
    arch: InternVLArchitecture,
    decoder_config: TransformerConfig,
    modules: BackendModules,
    elementwise: ElementwiseOps,
    context: ParallelContext,
    stage: Stage,
) -> LanguageModel:
    padded = padded_vocab_size(arch.language.vocab_size, context.plan.tp)
    language = LanguageModel(
        decoder_config,
        modules=modules,
        rope=rope_spec(config, arch),
        vocab_size=arch.language.vocab_size,
        padded_vocab_size=padded,
        memory=memory_savings(config.model),
        elementwise=elementwise,
        head_ports=head_ports(context, rows_per_rank=padded // context.plan.tp),
        router=router_of(config, arch, context),
        share_embeddings_and_output_weights=arch.language.tie_word_embeddings,
        groups=context.ranks.groups,
        pre_process=stage.pre_process,
        post_process=stage.post_process,
        vp_stage=stage.vp_stage,
    )
    _mark_split_over_tp(language)
    return language


def build_vision(
    config: RunConfig,
    arch: InternVLArchitecture,
    modules: BackendModules,
    elementwise: ElementwiseOps,
    context: ParallelContext,
    *,
    plain_modules: BackendModules | None = None,
    returns_all: bool = False,
) -> InternViT:
    """The vision tower, with its pyramid where the architecture has one; without weights.

    Args:
        config: the run.
        arch: architecture of the checkpoint.
        modules: modules of the back end.
        elementwise: operations between the linears.
        context: sizes of the parallel axes and this rank's place on them.
        plain_modules: those without adapters, of which a pyramid's smaller branches are made; None is `modules`.
        returns_all: of a pyramid, give every branch's patches, whatever its readout is.
    """
    arguments = partial(_tower_arguments, config, elementwise=elementwise, context=context)
    own = plain_modules or modules
    pyramid = arch.pyramid
    if pyramid is None:
        vision = InternViT(**arguments(arch, modules=modules))
    else:
        settings = InteractionSettings(
            heads=pyramid.heads,
            points=pyramid.points,
            value_ratio=pyramid.value_ratio,
            ffn_ratio=pyramid.ffn_ratio,
            attention=pyramid.attention,
            norm=pyramid.norm,
            projection=pyramid.projection,
            drop_path=pyramid.drop_path,
        )
        vision = PyramidTower(
            **arguments(arch, modules=modules),
            branches=[
                InternViT(**arguments(replace(arch, vision=branch), modules=own))
                for branch in pyramid.branches
            ],
            sizes=arch.tile_sizes,
            num_interactions=pyramid.num_interactions,
            settings=settings,
            returns_all=returns_all or pyramid.reads_all,
        )
    _mark_tower_part(vision, context)
    return vision


def _tower_arguments(
    config: RunConfig,
    arch: InternVLArchitecture,
    *,
    modules: BackendModules,
    elementwise: ElementwiseOps,
    context: ParallelContext,
) -> dict[str, Any]:
    """Arguments of `InternViT` for `arch.vision`."""
    return dict(
        config=vision_config(config, arch, context.plan),
        modules=modules,
        image_size=arch.vision.image_size,
        patch_size=arch.vision.patch_size,
        drop_path_rate=config.vision.drop_path_rate,
        qk_norm=_qk_norm(arch, modules, context),
        mlp_chunks=1 if config.vision.recompute == "selective" else 0,
        elementwise=elementwise,
        groups=tower_groups(context),
    )


def build_projector(
    config: RunConfig,
    arch: InternVLArchitecture,
    modules: BackendModules,
    elementwise: ElementwiseOps,
    context: ParallelContext,
) -> Projector | PyramidReadout:
    """InternVL's projector, or LLaVA's readout of a pyramid in its place; without weights.

    Args:
        config: the run.
        arch: architecture of the checkpoint.
        modules: modules of the back end; the readout has plain ones, whole on every rank.
        elementwise: operations between the linears.
        context: sizes of the parallel axes and this rank's place on them.
    """
    settings, groups = projector_config(config, arch, context.plan), tower_groups(context)
    projector: Projector | PyramidReadout
    if arch.reads_all_branches:
        projector = _readout(config, settings, arch, groups)
    else:
        projector = Projector(
            settings,
            modules=modules,
            input_size=arch.projector_width,
            ratio=arch.downsample_ratio,
            version=arch.pixel_shuffle_version,
            elementwise=elementwise,
            groups=groups,
        )
    _mark_tower_part(projector, context)
    return projector


def _readout(
    config: RunConfig,
    settings: TransformerConfig,
    arch: InternVLArchitecture,
    groups: ProcessGroupCollection,
) -> PyramidReadout:
    pyramid = arch.pyramid
    assert pyramid is not None
    side = arch.image_size // arch.vision.patch_size
    return PyramidReadout(
        settings,
        widths=[arch.vision.hidden_size, *(branch.hidden_size for branch in pyramid.branches)],
        grids=[(side, side), *((branch.grid, branch.grid) for branch in pyramid.branches)],
        side=pyramid.token_side,
        norm=pyramid.readout_norm,
        recomputes=config.vision.recompute != "none",
        groups=groups,
    )


def memory_savings(model: ModelConfig) -> MemorySavings:
    """What the run recomputes or keeps on the host, and its loss chunks and MLP chunks.

    Raises:
        ConfigError: activations are to move to host memory and are there already.
    """
    # A layer that is recomputed whole need not recompute its MLP, unless in MLP chunks.
    is_recomputed = model.recompute == "selective" or model.mlp_chunks > 1
    savings = MemorySavings(
        loss_chunk_tokens=model.loss_chunk_tokens,
        mlp_chunks=model.mlp_chunks if is_recomputed else 0,
        row_multiple=FP8_MULTIPLE[model.fp8],
    )
    if not model.offload_activations:
        return savings
    if not torch.cuda.is_available():
        raise ConfigError(
            "model.offload_activations is true, but this host has no GPU: activations are in host memory already; "
            "set it to false"
        )
    return replace(savings, offload=ActivationOffload())


def tower_groups(context: ParallelContext) -> ProcessGroupCollection:
    """Groups of tower and projector: of this rank alone, or tp where they are split over it."""
    singletons, tp_group = context.ranks.singleton_groups, context.ranks.groups.tp
    if context.plan.vision == "replicated":
        return singletons
    return ProcessGroupCollection(tp=tp_group, cp=singletons.cp, pp=singletons.pp, tp_cp=tp_group)


def part_modules(
    modules: BackendModules,
    part: Part,
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
) -> BackendModules:
    """The modules of one part of the model, its linears with the adapters that the run asks for."""
    is_language = part == "language"
    split = PartSplit(
        group=context.ranks.groups.tp if is_language else tower_groups(context).tp,
        sequence_parallel=is_language and context.plan.sequence_parallel,
        inputs_differ=not is_language and context.plan.shares_tiles_over_tp,
    )
    adapted = adapted_modules(modules, part, lora=config.lora, arch=arch, split=split)
    return _modules_of_family(adapted, arch) if is_language else adapted


def _modules_of_family(modules: BackendModules, arch: InternVLArchitecture) -> BackendModules:
    """The decoder's modules with what differs from a llama's, beyond what mcore's configuration says."""
    language = arch.language
    if language.proj_bias:
        modules = with_proj_bias(modules)
    if language.experts is not None and language.experts.is_clamped:
        modules = with_clamped_experts(
            modules, ffn_size=language.experts.ffn_size, limit=language.experts.clamp
        )
    return modules


def _qk_norm(arch: InternVLArchitecture, modules: BackendModules, context: ParallelContext) -> Any:
    """Norm of the tower's queries and keys over all heads, which may be split over ranks."""
    if not arch.vision.qk_normalization:
        return None
    if context.plan.vision == "replicated":
        return modules.norm
    group = context.ranks.groups.tp
    return partial(
        SplitRMSNorm,
        whole_size=arch.vision.hidden_size,
        sum_over_tp=partial(_sum_over_tp, group=group),
        tp_group=group,
    )


def _sum_over_tp(x: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """Sum in forward and, because every rank uses the sum in its own way, in backward."""
    summed = mappings.reduce_from_tensor_model_parallel_region(x, group=group)
    return mappings.copy_to_tensor_model_parallel_region(summed, group=group)


def _mark_tower_part(part: torch.nn.Module, context: ParallelContext) -> None:
    """Set mcore's marks on tower or projector, by how it lies on the tp ranks."""
    if context.plan.vision == "tensor":
        _mark_split_over_tp(part)
    else:
        _mark_replicated_over_tp(part, sum_over_tp=context.plan.sequence_parallel)


def _mark_split_over_tp(part: torch.nn.Module) -> None:
    """Mark the weights that are split over tp ranks, as mcore expects.

    mcore's local linears set this mark when they draw initial weights, which is switched off here; without it
    a gradient norm counts the slice of tp rank 0 only. Transformer Engine's linears mark themselves.
    """
    for module in part.modules():
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, (RowParallelLinear, ColumnParallelLinear, VocabParallelEmbedding)):
            weight = getattr(module, "weight", None)
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _mark_replicated_over_tp(part: torch.nn.Module, *, sum_over_tp: bool) -> None:
    """Mark parameters of which each tp rank holds a copy, as mcore expects.

    mcore's linears set the mark of split weights even at size 1, which would count their norm once per tp rank.
    With sequence parallelism the tp ranks encode different tiles, so their gradients are summed; without it
    they encode the same tiles and hold the same gradients.
    """
    for parameter in part.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = sum_over_tp  # type: ignore[attr-defined]


def head_ports(context: ParallelContext, *, rows_per_rank: int) -> HeadPorts:
    """Collectives of the vocabulary-parallel head; serial when tp is 1."""
    plan, ranks = context.plan, context.ranks
    if plan.tp == 1:
        return HeadPorts()
    group = ranks.groups.tp
    gather: Callable[[Tensor], Tensor] = partial(mappings.copy_to_tensor_model_parallel_region, group=group)
    if plan.sequence_parallel:
        gather = partial(
            mappings.gather_from_sequence_parallel_region, tensor_parallel_output_grad=True, group=group
        )
    return HeadPorts(
        vocab_start_index=ranks.tp_rank * rows_per_rank,
        gather_hidden=gather,
        own_rows=partial(_own_rows, context=context),
        reduce_max=partial(_all_reduce, op=dist.ReduceOp.MAX, group=group),
        reduce_sum=partial(_all_reduce, op=dist.ReduceOp.SUM, group=group),
    )


def _own_rows(x: Tensor, *, context: ParallelContext) -> Tensor:
    """The slice of a tp rank under sequence parallelism, else all."""
    plan = context.plan
    return x.chunk(plan.tp)[context.ranks.tp_rank] if plan.sequence_parallel else x


def router_of(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext
) -> Callable[..., ExpertRouter] | None:
    """What builds the router of a layer with experts; None for a model without."""
    experts = arch.language.experts
    if experts is None:
        return None
    aux_loss = config.moe.aux_loss
    settings = RouterSettings(
        normalizes_top_k=experts.normalizes_top_k,
        aux_loss=experts.aux_loss_coefficient if aux_loss is None else aux_loss,
        z_loss=config.moe.z_loss,
        capacity_factor=config.moe.capacity_factor,
        num_sparse_layers=len(experts.sparse_layers),
        has_bias=experts.is_clamped,
    )
    groups = context.ranks.groups
    group = groups.tp_cp if context.plan.sequence_parallel else groups.cp
    sum_over_pack = partial(_all_reduce, op=dist.ReduceOp.SUM, group=group)
    return partial(ExpertRouter, settings=settings, sum_over_pack=sum_over_pack)


def _all_reduce(x: Tensor, *, op: Any, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(x, op=op, group=group)
    return x


def freeze(model_chunks: list[InternVL], config: RunConfig) -> None:
    """Switch off gradients of what is not trained: frozen parts, and the weights that adapters are added to."""
    trained = parts_trained_whole(config)
    for model_chunk in model_chunks:
        for name, part in model_chunk.parts().items():
            for param_name, parameter in part.named_parameters():
                if not is_in(f"{name}.{param_name}", trained) and not is_adapter_parameter(param_name):
                    parameter.requires_grad = False
