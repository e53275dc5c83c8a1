"""FLOPs that a rank executes for one micro batch: the model's, and what recomputation and costs add.

    linears     1 forward, 2 backward (1 where weights are frozen), 1 more where they are recomputed
    attention   1 forward, 2.5 backward (fused costs form the scores again: 5 products against 2), 1 if recomputed
    head        3 in forward: logits and both products of their gradient

Adapters are left out: a pair of rank r has r (in + out) of in * out weights, 1 or 2 in 100.

The convention for model FLOPs and MFU is in `config/arch/flops.py` and knows none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_v2pe.config.arch.flops import (
    attention_flops,
    branch_attention_flops,
    branch_linear_flops,
    interaction_flops,
    projector_flops,
    tower_attention_flops,
    tower_branches,
    tower_linear_flops,
)
from megatron_v2pe.config.arch.pyramid import interval_stops
from megatron_v2pe.config.schema import ModelConfig, VisionConfig
from megatron_v2pe.planning.memory.setting import EXPERT_IMBALANCE, Setting
from megatron_v2pe.planning.request.stages import ModelChunk

ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class ModelChunkFlops:
    """Executed FLOPs of one micro batch in one model chunk on one rank; `fp8_linear` are those of linears in FP8."""

    linear: float
    fp8_linear: float
    attention_forward: float
    attention_backward: float
    head: float
    tower_linear: float
    tower_attention_bytes: float

    @property
    def total(self) -> float:
        """All of them."""
        attention = self.attention_forward + self.attention_backward
        return (
            self.linear
            + self.fp8_linear
            + attention
            + self.head
            + self.tower_linear
            + self.tower_attention_bytes
        )


def linear_passes(model: ModelConfig, *, is_trained: bool) -> tuple[float, float]:
    """How often attention's linears and the MLP's are multiplied, in forward passes.

    A chunked MLP inside a recomputed layer runs forward a third time, MLP chunk by MLP chunk.
    """
    backward = 2.0 if is_trained else 1.0
    again = 1.0 if model.recompute == "full" else 0.0
    mlp_again = 1.0 if model.recompute == "selective" or model.mlp_chunks > 1 else 0.0
    return 1.0 + backward + again, 1.0 + backward + again + mlp_again


def model_chunk_flops(setting: Setting, model_chunk: ModelChunk) -> ModelChunkFlops:
    """FLOPs of one micro batch on a rank: tokens over cp, weights and heads over tp, tiles over their ranks."""
    arch, plan, model = setting.arch, setting.plan, setting.config.model
    language = arch.language
    hidden, share = language.hidden_size, model_chunk.num_layers / language.num_layers
    is_trained = setting.trains("language")
    projections, mlp = linear_passes(model, is_trained=is_trained)
    attention_weights = language.num_layers * language.attention_weights
    mlp_weights = float(language.active_weights - attention_weights)
    if language.experts is not None:
        mlp_weights *= EXPERT_IMBALANCE
    weights = projections * attention_weights + mlp * mlp_weights
    attention = share * attention_flops(arch, setting.pack.document_lengths) / (plan.tp * plan.cp)
    tokens, imbalance = setting.slowest_rank
    attention *= imbalance
    attention_forwards = 2.0 if model.recompute == "full" else 1.0
    supervised = setting.pack.supervised_tokens / plan.cp if model_chunk.is_last else 0.0
    head_products = 2.0 if is_trained else 1.0
    tower_linear, tower_attention_bytes = tower_flops(setting) if model_chunk.is_first else (0.0, 0.0)
    linear = 2.0 * share * weights * tokens / plan.tp
    fp8 = linear * setting.fp8_layers(model_chunk) / max(1, model_chunk.num_layers)
    return ModelChunkFlops(
        linear=linear - fp8,
        fp8_linear=fp8,
        attention_forward=attention_forwards * attention,
        attention_backward=ATTENTION_BACKWARD * attention,
        head=2.0 * (1 + head_products) * hidden * language.vocab_size * supervised / plan.tp,
        tower_linear=tower_linear,
        tower_attention_bytes=tower_attention_bytes,
    )


def tower_flops(setting: Setting) -> tuple[float, float]:
    """Linears (projector and a pyramid's interactions included) and attention of the busiest rank's tiles."""
    arch, vision, tiles = setting.arch, setting.config.vision, setting.tiles
    split = setting.plan.tower_tp
    sliced = vision.micro_batch_tiles > 0 and tiles > vision.micro_batch_tiles
    linear, attention = 1.0, 1.0
    sliced_passes = partial(tower_passes, vision, is_sliced=sliced)
    if setting.has_gradients("vision"):
        linear, attention = sliced_passes(is_trained=setting.trains("vision"))
    projector = 1.0
    has_gradients = setting.has_gradients("vision") or setting.trains_pyramid
    if has_gradients or setting.has_gradients("projector"):
        again = arch.reads_all_branches and vision.recompute != "none"
        projector += 1.0 + setting.trains("projector") + sliced + again
    layers = projector * projector_flops(arch, tiles)
    if arch.reads_all_branches:
        layers *= split  # every rank computes the readout whole
    if arch.pyramid is None:
        layers += linear * tower_linear_flops(arch, tiles)
        return layers / split, attention * tower_attention_flops(arch, tiles) / split
    return _pyramid_flops(setting, layers, sliced_passes, split=split)


def _pyramid_flops(
    setting: Setting, projector: float, passes: Callable[..., tuple[float, float]], *, split: int
) -> tuple[float, float]:
    """`tower_flops` of a tower with a pyramid; a frozen large branch passes gradients on after its first interval."""
    arch, vision, tiles = setting.arch, setting.config.vision, setting.tiles
    assert arch.pyramid is not None
    sliced = vision.micro_batch_tiles > 0 and tiles > vision.micro_batch_tiles
    linear, attention = projector, 0.0
    for index, (branch, rows) in enumerate(tower_branches(arch)):
        forward = 1.0 + sliced if setting.trains_pyramid else 1.0
        own_linear, own_attention = forward, forward
        if index and setting.trains_pyramid:
            own_linear, own_attention = passes(is_trained=True)
        elif not index and setting.has_gradients("vision"):
            own_linear, own_attention = passes(is_trained=setting.trains("vision"))
        elif not index and setting.trains_pyramid:
            before = interval_stops(branch.num_layers, arch.pyramid.num_interactions)[0] / branch.num_layers
            later_linear, later_attention = passes(is_trained=False)
            own_linear = before * forward + (1 - before) * later_linear
            own_attention = before * forward + (1 - before) * later_attention
        linear += own_linear * branch_linear_flops(branch, rows, tiles)
        attention += own_attention * branch_attention_flops(branch, rows, tiles)
    trained = setting.trains_pyramid
    exchange = 3.0 + (vision.recompute != "none") + sliced if trained else 1.0
    if not trained and setting.has_gradients("vision"):
        exchange = 2.0 + (vision.recompute != "none") + sliced
    return linear / split + exchange * interaction_flops(
        arch, tiles
    ), attention / split  # interactions: whole


def tower_passes(vision: VisionConfig, *, is_sliced: bool, is_trained: bool) -> tuple[float, float]:
    """Forward passes' worth of the tower's linears and attention; the MLP has 2/3 of a layer's linears."""
    again = (1.0 if vision.recompute == "full" else 0.0) + is_sliced
    mlp_again = 2.0 / 3.0 if vision.recompute == "selective" else 0.0
    return 2.0 + is_trained + again + mlp_again, 1.0 + ATTENTION_BACKWARD + again
