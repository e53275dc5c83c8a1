"""What one rank of any layout holds, without weights, memory or a launcher.

    (run, architecture, plan, rank) --fake world, meta device, build_model--> names, shapes, dtypes, bytes

The model is built by `build_model` itself, so the answer cannot drift from what a run allocates. Gradients and
optimizer state are those of `wrap_for_training`: mcore's buffers, with their padding, and this rank's shard of Adam's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.optimizer import wrap_for_training
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_model_split, check_pipeline, check_vision_split
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.fake_world import fake_world
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.topology import Ranks

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Parameter name in the whole model -> shape and dtype of this rank's piece."""


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
        config: the run; parallel sizes are taken from `plan`, layout and dtype from here.
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
    with fake_world(plan, rank=rank) as ranks:
        yield build_model(native, arch, plan=plan, ranks=ranks), ranks


def build_rank_shapes(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int
) -> Shapes:
    """Every parameter that a rank holds; see `rank_model`.

    A tied head lies on the last stage as a second copy of the embedding, and is listed there as what it is.
    """
    with rank_model(config, arch, plan=plan, rank=rank) as (chunks, _):
        return {
            whole_name(chunk, name): (tuple(parameter.shape), parameter.dtype)
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        }


def build_rank_bytes(
    config: RunConfig, arch: InternVLArchitecture, *, plan: ParallelPlan, rank: int
) -> RankBytes:
    """What training keeps on a rank: exact, by wrapping the chunks as `train` does."""
    with rank_model(config, arch, plan=plan, rank=rank) as (chunks, _):
        parameters = sum(_bytes(parameter) for chunk in chunks for parameter in chunk.parameters())
        trainer = wrap_for_training(chunks, config)
        buffers = [
            buffer for chunk in trainer.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        return RankBytes(
            parameters=parameters,
            gradients=sum(_bytes(buffer.grad_data) for buffer in buffers),
            optimizer=_optimizer_bytes(trainer.optimizer, config),
        )


def whole_name(chunk: InternVL, name: str) -> str:
    """Name of a chunk's parameter in the whole model: layers are numbered over all stages, experts over all ranks."""
    prefix = "language.decoder.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    layer: Any = chunk.language.decoder.layers[int(number)]
    local = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", rest)
    if local:
        expert = layer.mlp.local_expert_indices[int(local[1])]
        rest = f"mlp.experts.{expert}.{local[2]}"
    return f"{prefix}{layer.layer_number - 1}.{rest}"


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
