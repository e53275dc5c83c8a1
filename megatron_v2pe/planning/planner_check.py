"""The planner against real ranks: built by `build_model` and wrapped as for training, without memory.

predicted parameters, weights, gradients, optimizer bytes   ==   those of the rank on the meta device
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.assembly.optim.optimizer import wrap_for_training
from megatron_v2pe.assembly.rank_model import rank_model
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.memory.adapters import ParameterSize
from megatron_v2pe.planning.memory.parameters import model_chunk_parameters
from megatron_v2pe.planning.memory.state import MAIN_WEIGHT_BYTES, MOMENT_BYTES, StateBytes, rank_state
from megatron_v2pe.planning.request.stages import model_chunks_of_rank


@dataclass(frozen=True, kw_only=True)
class BuiltRank:
    """A rank as it was built: parameters of each model chunk in order, and bytes of its buffers."""

    parameters: tuple[tuple[ParameterSize, ...], ...]
    state: StateBytes


@dataclass(frozen=True, kw_only=True)
class RankComparison:
    """Predicted against built."""

    rank: int
    predicted: StateBytes
    built: StateBytes
    same_parameters: bool

    @property
    def is_exact(self) -> bool:
        """Every name, number and byte agrees."""
        return self.same_parameters and self.predicted == self.built


def built_rank(config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int) -> BuiltRank:
    """Build one rank of any layout on the meta device."""
    is_half = config.runtime.dtype == "bfloat16"
    with rank_model(config, arch, plan=plan, rank=rank) as (model_chunks, _):
        named = [
            [(name, p.numel()) for name, p in model_chunk.named_parameters()] for model_chunk in model_chunks
        ]
        frozen = sum(
            p.numel() * p.itemsize
            for model_chunk in model_chunks
            for p in model_chunk.parameters()
            if not p.requires_grad
        )
        trainer = wrap_for_training(model_chunks, config)
        buffers = [
            buffer
            for model_chunk in trainer.wrapped
            for buffer in (*model_chunk.buffers, *model_chunk.expert_parallel_buffers)
        ]
        shard = sum(
            parameter.numel()
            for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
            for group in part.optimizer.param_groups
            for parameter in group["params"]
        )
        weights = sum(buffer.param_data.numel() * buffer.param_data.itemsize for buffer in buffers)
        gradients = sum(buffer.grad_data.numel() * buffer.grad_data.itemsize for buffer in buffers)
    return BuiltRank(
        parameters=tuple(tuple(parameters) for parameters in named),
        state=StateBytes(
            weights_bytes=weights + frozen,
            gradients_bytes=gradients,
            optimizer_bytes=shard * (MOMENT_BYTES + (MAIN_WEIGHT_BYTES if is_half else 0)),
        ),
    )


def compare_rank(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int
) -> RankComparison:
    """One rank, predicted and built."""
    built = built_rank(config, arch, plan=plan, rank=rank)
    pp_rank = rank // (plan.tp * plan.cp * plan.dp)
    model_chunks = model_chunks_of_rank(config.parallel, arch.language.num_layers, plan, pp_rank)
    predicted = tuple(
        model_chunk_parameters(arch, plan, model_chunk, config.lora) for model_chunk in model_chunks
    )
    return RankComparison(
        rank=rank,
        predicted=rank_state(config, arch, plan, rank),
        built=built.state,
        same_parameters=predicted == built.parameters,
    )
