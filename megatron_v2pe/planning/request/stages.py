"""What each pipeline rank holds: decoder layers, tower, embedding, head, and how many micro batches at a time.

    E t t t | t t t | t t t | t t t L          pp 4
    rank 0     1       2        3              micro batches in flight under 1F1B: 4, 3, 2, 1

A rank's memory and time follow from this; the slowest and the fullest rank decide for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.pipeline import expand_layout
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.parallel.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class ModelChunk:
    """A model chunk: one virtual stage of a pipeline rank.

    Attributes:
        num_layers: decoder layers.
        first_layer: number of the first of them in the whole model.
        is_first: tower, projector and embedding are here.
        is_last: final norm, head and loss are here.
    """

    num_layers: int
    is_first: bool
    is_last: bool
    first_layer: int = 0


def model_chunks_of_rank(
    parallel: ParallelConfig, num_layers: int, plan: ParallelPlan, pp_rank: int
) -> tuple[ModelChunk, ...]:
    """Model chunks of a pipeline rank; virtual stage v of rank r is stage v * pp + r of the whole pipeline."""
    num_stages = plan.pp * plan.vpp
    if parallel.pipeline_layout:
        counts = [stage.count("t") for stage in expand_layout(parallel.pipeline_layout)]
    else:
        counts = [num_layers // num_stages] * num_stages
    stages = [virtual * plan.pp + pp_rank for virtual in range(plan.vpp)]
    return tuple(
        ModelChunk(
            num_layers=counts[stage],
            first_layer=sum(counts[:stage]),
            is_first=stage == 0,
            is_last=stage == num_stages - 1,
        )
        for stage in stages
    )


def forwards_in_flight(plan: ParallelPlan, pp_rank: int, micro_batches: int) -> int:
    """Forward passes of a model chunk whose activations a rank holds at a time, at most.

    1F1B: rank r runs pp - r - 1 forward passes before its first backward pass, and one more before each, so pp - r
    are held. Interleaved (mcore's `get_pp_rank_microbatches`): 2 (pp - r - 1) + (vpp - 1) pp warm-up passes of one
    model chunk each, and one more. Never more than all of them.
    """
    if plan.pp == 1:
        return 1
    if plan.vpp == 1:
        return min(plan.pp - pp_rank, micro_batches)
    warm_up = 2 * (plan.pp - pp_rank - 1) + (plan.vpp - 1) * plan.pp
    return min(warm_up + 1, micro_batches * plan.vpp)
