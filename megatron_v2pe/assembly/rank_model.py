"""What one rank of any layout holds, without weights, memory or a launcher.

    (run, architecture, plan, rank) --fake world, meta device, build_model--> model chunks, bytes

The model is built by `build_model` itself, so the result cannot differ from what a run allocates. Gradients and
optimizer state are those of `wrap_for_training`: mcore's buffers, with their padding, and this rank's shard of Adam's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.optim.optimizer import wrap_for_training
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_model_split, check_pipeline, check_vision_split
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.fake_world import fake_world
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.topology import Ranks


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """What a rank keeps from step to step, in bytes; activations are not in it.

    Attributes:
        parameters: weights in the compute dtype.
        gradients: buffers in float32, padding included.
        optimizer: this rank's shard of master weights (bfloat16 runs) and of Adam's two moments, float32.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.parameters + self.gradients + self.optimizer


@contextmanager
def rank_model(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int
) -> Iterator[tuple[list[InternVL], Ranks]]:
    """This rank's model chunks on the meta device, with the groups that `sharded_state_dict` asks for.

    Args:
        config: the run; parallel sizes are those of `plan`, layout and dtype those of the run.
        arch: the model.
        plan: sizes of all axes.
        rank: rank in the plan's world.

    Raises:
        ConfigError: the layout does not fit the model.
    """
    check_model_split(config.parallel, arch)
    check_vision_split(config.parallel, arch)
    check_pipeline(config.parallel, arch.language.num_layers)
    # Transformer Engine names and shapes parameters as the native layers do, but asks for a device.
    native = replace(config, parallel=replace(config.parallel, attention_backend="native"))
    with fake_world(plan, rank=rank) as context:
        yield build_model(native, arch, context), context.ranks


def build_rank_bytes(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int
) -> RankBytes:
    """What training keeps on a rank: exact, by wrapping the model chunks as `train` does."""
    with rank_model(config, arch, plan=plan, rank=rank) as (model_chunks, _):
        parameters = sum(_bytes(parameter) for chunk in model_chunks for parameter in chunk.parameters())
        trainer = wrap_for_training(model_chunks, config)
        buffers = [
            buffer
            for wrapper in trainer.wrapped
            for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers)
        ]
        return RankBytes(
            parameters=parameters,
            gradients=sum(_bytes(buffer.grad_data) for buffer in buffers),
            optimizer=_optimizer_bytes(trainer.optimizer, config),
        )


def _optimizer_bytes(optimizer: Any, config: RunConfig) -> int:
    """mcore's groups hold this rank's shard of the weights; Adam keeps two numbers for each, bfloat16 runs a third."""
    shard = sum(
        parameter.numel()
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    )
    numbers = 3 if config.runtime.dtype == "bfloat16" else 2
    return shard * numbers * torch.float32.itemsize


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize
