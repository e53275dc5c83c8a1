"""Weights, gradients and optimizer state of any rank of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import PARTS, parts_trained_whole
from megatron_v2pe.config.schema import LoRAConfig, RunConfig
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.memory.parameters import chunk_parameters
from megatron_v2pe.planning.memory.state import StateBytes, is_trained, state_bytes
from megatron_v2pe.planning.request.stages import Chunk, chunks_of_rank

TIED = frozenset({"language.embedding.word_embeddings.weight", "language.output_layer.weight"})


def frozen_parts(config: RunConfig) -> frozenset[str]:
    """Parts whose own weights are not trained, by the first word of their parameters' names."""
    return frozenset(PARTS) - frozenset(parts_trained_whole(config))


def own_bucket(arch: InternVLArchitecture, plan: ParallelPlan) -> frozenset[str]:
    """Parameters with a bucket of their own: a tied embedding that first and last stage both hold."""
    return TIED if arch.language.tie_word_embeddings and plan.pp > 1 else frozenset()


def rank_state(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan, rank: int) -> StateBytes:
    """State of a rank of the world; rank = ((pp * dp + dp) * cp + cp) * tp + tp."""
    sharing_ranks = plan.dp * plan.cp
    pp_rank, rest = divmod(rank, sharing_ranks * plan.tp)
    total = StateBytes(weights_bytes=0, gradients_bytes=0, optimizer_bytes=0)
    for chunk in chunks_of_rank(config.parallel, arch.language.num_layers, plan, pp_rank):
        total = total + state_bytes(
            chunk_parameters(arch, plan, chunk, config.lora),
            element_bytes=2 if config.runtime.dtype == "bfloat16" else 4,
            sharing_ranks=sharing_ranks,
            sharing_rank=rest // plan.tp,
            frozen=frozen_parts(config),
            own_bucket=own_bucket(arch, plan),
        )
    return total


@dataclass(frozen=True, kw_only=True)
class TrainedNumbers:
    """Trained numbers of a rank, and those whose gradients are summed over tp at the end of a step."""

    all: int
    summed_over_tp: int


@lru_cache(maxsize=512)
def trained_numbers(
    arch: InternVLArchitecture,
    plan: ParallelPlan,
    chunks: tuple[Chunk, ...],
    frozen: frozenset[str],
    lora: LoRAConfig,
) -> TrainedNumbers:
    """Count a pipeline rank's trained numbers.

    With sequence parallelism mcore sums over tp, in one float32 copy, the gradients of the norms, and of the whole
    tower and projector where they are replicated and encode different tiles.

    Args:
        arch: the model.
        plan: sizes of the axes.
        chunks: of the rank.
        frozen: see `frozen_parts`.
        lora: adapters.
    """
    trained = [
        (name, size)
        for chunk in chunks
        for name, size in chunk_parameters(arch, plan, chunk, lora)
        if is_trained(name, frozen)
    ]
    sums = plan.tp > 1 and plan.sequence_parallel
    return TrainedNumbers(
        all=sum(size for _, size in trained),
        summed_over_tp=sum(size for name, size in trained if _is_summed(name, plan)) if sums else 0,
    )


def _is_summed(parameter: str, plan: ParallelPlan) -> bool:
    if parameter.startswith("language."):
        return "layernorm" in parameter
    return plan.vision == "replicated"
