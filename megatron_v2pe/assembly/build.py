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
from torch import Tensor

from megatron_v2pe.assembly.adapters import PartSplit, adapted_modules
from megatron_v2pe.assembly.kernels import choose_modules
from megatron_v2pe.assembly.mcore_config import (
    language_config,
    projector_config,
    rope_spec,
    vision_config,
)
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import PARTS, Part, parts_trained_whole
from megatron_v2pe.config.schema import ModelConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.models.language import LanguageModel
from megatron_v2pe.models.layer_specs import BackendModules
from megatron_v2pe.models.lora import is_adapter
from megatron_v2pe.models.loss import HeadPorts
from megatron_v2pe.models.memory import MemorySavings
from megatron_v2pe.models.norms import SplitRMSNorm
from megatron_v2pe.models.projector import Projector
from megatron_v2pe.models.vision import InternViT
from megatron_v2pe.parallel.feature_router import FeatureRouter
from megatron_v2pe.parallel.plan import ParallelPlan, padded_vocab_size
from megatron_v2pe.parallel.topology import Ranks


def build_model(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, ranks: Ranks
) -> list[InternVL]:
    """Build this rank's model chunks, without weights; the caller loads a checkpoint into them.

    Returns:
        One chunk for each virtual pipeline stage of this rank, one without virtual stages; on `ranks.device`.
    """
    plain = choose_modules(config.parallel, dtype=config.runtime.dtype)
    modules = {part: part_kernels(plain, part, config, arch, plan=plan, ranks=ranks) for part in PARTS}
    decoder_config = language_config(config, arch, plan)
    chunks = []
    for stage in stages_of_rank(plan, ranks):
        language = _build_language(
            config, arch, decoder_config, modules=modules["language"], plan=plan, ranks=ranks, stage=stage
        )
        _mark_split_over_tp(language)
        vision, projector = None, None
        if stage.pre_process:
            vision = _build_vision(config, arch, modules=modules["vision"], plan=plan, ranks=ranks)
            projector = _build_projector(config, arch, modules=modules["projector"], plan=plan, ranks=ranks)
            for part in (vision, projector):
                if plan.vision == "tensor":
                    _mark_split_over_tp(part)
                else:
                    _mark_replicated_over_tp(part, sum_over_tp=plan.sequence_parallel)
        chunk = InternVL(
            decoder_config,
            vision=vision,
            projector=projector,
            language=language,
            tile_size=arch.image_size,
            micro_batch_tiles=config.vision.micro_batch_tiles,
            route_features=FeatureRouter(ranks.tile_group, ranks.groups.tp),
            replica_group=ranks.vision_replica_group if plan.vision == "replicated" else None,
        )
        # mcore's and Transformer Engine's modules are on the GPU already; our norms, embeddings and scales are not.
        chunks.append(chunk.to(ranks.device))
    freeze(chunks, config)
    return chunks


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


def stages_of_rank(plan: ParallelPlan, ranks: Ranks) -> list[Stage]:
    """Stages of this pipeline rank: virtual stage v of rank r is stage v * pp + r of the whole pipeline."""
    return [
        Stage(
            pre_process=ranks.is_first_stage and virtual == 0,
            post_process=ranks.is_last_stage and virtual == plan.vpp - 1,
            vp_stage=virtual if plan.vpp > 1 else None,
        )
        for virtual in range(plan.vpp)
    ]


def _build_language(
    config: RunConfig,
    arch: InternVLArchitecture,
    decoder_config: Any,
    *,
    modules: BackendModules,
    plan: ParallelPlan,
    ranks: Ranks,
    stage: Stage,
) -> LanguageModel:
    padded = padded_vocab_size(arch.language.vocab_size, plan.tp)
    return LanguageModel(
        decoder_config,
        modules=modules,
        rope=rope_spec(config, arch),
        vocab_size=arch.language.vocab_size,
        padded_vocab_size=padded,
        memory=memory_savings(config.model),
        head_ports=head_ports(plan, ranks, rows_per_rank=padded // plan.tp),
        share_embeddings_and_output_weights=arch.language.tie_word_embeddings,
        groups=ranks.groups,
        pre_process=stage.pre_process,
        post_process=stage.post_process,
        vp_stage=stage.vp_stage,
    )


def memory_savings(model: ModelConfig) -> MemorySavings:
    """What the run computes again, in pieces, or keeps on the host.

    Raises:
        ConfigError: activations are to move to host memory and are there already.
    """
    # A layer that is recomputed whole has no use for recomputing an MLP that is in one piece.
    is_recomputed = model.recompute == "selective" or model.mlp_chunks > 1
    savings = MemorySavings(
        loss_chunk_tokens=model.loss_chunk_tokens, mlp_chunks=model.mlp_chunks if is_recomputed else 0
    )
    if not model.offload_activations:
        return savings
    if not torch.cuda.is_available():
        raise ConfigError(
            "model.offload_activations is true, but this host has no GPU: activations are in host memory already; "
            "set it to false"
        )
    return replace(savings, saved_tensors=partial(torch.autograd.graph.save_on_cpu, pin_memory=True))


def tower_groups(plan: ParallelPlan, ranks: Ranks) -> ProcessGroupCollection:
    """Groups of tower and projector: of this rank alone, or tp where they are split over it."""
    alone = ranks.singleton_groups
    if plan.vision == "replicated":
        return alone
    return ProcessGroupCollection(tp=ranks.groups.tp, cp=alone.cp, pp=alone.pp, tp_cp=ranks.groups.tp)


def part_kernels(
    modules: BackendModules,
    part: Part,
    config: RunConfig,
    arch: InternVLArchitecture,
    *,
    plan: ParallelPlan,
    ranks: Ranks,
) -> BackendModules:
    """The kernels for a part, its linears with the adapters that the run asks for."""
    is_language = part == "language"
    split = PartSplit(
        group=ranks.groups.tp if is_language else tower_groups(plan, ranks).tp,
        sequence_parallel=is_language and plan.sequence_parallel,
        inputs_differ=not is_language and plan.deals_tiles_over_tp,
    )
    return adapted_modules(modules, part, lora=config.lora, arch=arch, split=split)


def _qk_norm(arch: InternVLArchitecture, *, modules: BackendModules, plan: ParallelPlan, ranks: Ranks) -> Any:
    """Norm of the tower's queries and keys over all heads, which may lie on several ranks."""
    if not arch.vision.qk_normalization:
        return None
    if plan.vision == "replicated":
        return modules.norm
    group = ranks.groups.tp
    return partial(
        SplitRMSNorm,
        whole_size=arch.vision.hidden_size,
        sum_over_tp=partial(_sum_over_tp, group=group),
        tp_group=group,
    )


def _sum_over_tp(x: Tensor, *, group: Any) -> Tensor:
    """Sum in forward and, because every rank uses the sum in its own way, in backward."""
    summed = mappings.reduce_from_tensor_model_parallel_region(x, group=group)
    return mappings.copy_to_tensor_model_parallel_region(summed, group=group)


def _build_vision(
    config: RunConfig,
    arch: InternVLArchitecture,
    *,
    modules: BackendModules,
    plan: ParallelPlan,
    ranks: Ranks,
) -> InternViT:
    return InternViT(
        vision_config(config, arch, plan),
        modules=modules,
        image_size=arch.vision.image_size,
        patch_size=arch.vision.patch_size,
        drop_path_rate=config.vision.drop_path_rate,
        qk_norm=_qk_norm(arch, modules=modules, plan=plan, ranks=ranks),
        mlp_chunks=1 if config.vision.recompute == "selective" else 0,
        groups=tower_groups(plan, ranks),
    )


def _build_projector(
    config: RunConfig,
    arch: InternVLArchitecture,
    *,
    modules: BackendModules,
    plan: ParallelPlan,
    ranks: Ranks,
) -> Projector:
    return Projector(
        projector_config(config, arch, plan),
        modules=modules,
        vision_channels=arch.vision.hidden_size,
        ratio=arch.downsample_ratio,
        version=arch.pixel_shuffle_version,
        groups=tower_groups(plan, ranks),
    )


def _mark_split_over_tp(part: torch.nn.Module) -> None:
    """Tell mcore which weights tp ranks hold pieces of.

    mcore's local linears set this mark while they draw initial weights, which is switched off here; without it
    a gradient norm counts the piece of tp rank 0 only. Transformer Engine's linears mark themselves.
    """
    for module in part.modules():
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, (RowParallelLinear, ColumnParallelLinear, VocabParallelEmbedding)):
            weight = getattr(module, "weight", None)
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _mark_replicated_over_tp(part: torch.nn.Module, *, sum_over_tp: bool) -> None:
    """Tell mcore that tp ranks hold copies of this part.

    Its linears claim to be tensor parallel even at size 1, which would count their norm once per tp rank.
    With sequence parallelism the tp ranks encode different tiles, so their gradients are summed; without it
    they encode the same tiles and hold the same gradients.
    """
    for parameter in part.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = sum_over_tp  # type: ignore[attr-defined]


def head_ports(plan: ParallelPlan, ranks: Ranks, *, rows_per_rank: int) -> HeadPorts:
    """Collectives of the vocabulary-parallel head; serial when tp is 1."""
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
        reduce_max=partial(_all_reduce, op=dist.ReduceOp.MAX, group=group),
        reduce_sum=partial(_all_reduce, op=dist.ReduceOp.SUM, group=group),
    )


def _all_reduce(x: Tensor, *, op: Any, group: Any) -> Tensor:
    dist.all_reduce(x, op=op, group=group)
    return x


def freeze(chunks: list[InternVL], config: RunConfig) -> None:
    """Stop gradients of what the run keeps as it is: frozen parts, and what adapters are added to."""
    trained = parts_trained_whole(config)
    for chunk in chunks:
        for name, part in chunk.parts().items():
            for param_name, parameter in part.named_parameters():
                if name not in trained and not is_adapter(param_name):
                    parameter.requires_grad = False
