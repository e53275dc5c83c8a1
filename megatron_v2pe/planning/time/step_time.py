"""Predicted time of a step from FLOPs, bytes and the stated rates of `hardware.py`.

    micro batch on a stage   linears + attention + head + tower + element-wise + what communication is not hidden
    step                     (micro batches + (pp - 1) / vpp) * the slowest stage + gradients, weights, optimizer

Ring hops overlap the attention of the block before; everything else waits. Nothing here was measured on a
GPU: see `hardware.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.activations import ModelChunkMemory
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.hardware import Hardware, group_gb_s, hop_gb_s
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.time.compute import model_chunk_flops
from megatron_v2pe.planning.time.traffic import (
    ModelChunkTraffic,
    StepTraffic,
    forward_passes,
    model_chunk_traffic,
)

OPTIMIZER_BYTES = 30  # a number: gradient 4, main weight 4 + 4, moments 8 + 8, weight 2
ACCUMULATION_BYTES = (
    12  # a weight and micro batch: gradient written and read (2 + 2), buffer read and written (4 + 4)
)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by term, for the slowest stage.

    Attributes:
        terms: seconds by name; they add up to the step.
        stage_seconds: one micro batch on each pipeline rank.
        slowest: pipeline rank that decides.
    """

    terms: dict[str, float]
    stage_seconds: tuple[float, ...]
    slowest: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.terms.values())

    @property
    def binding(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def micro_batch_seconds(
    setting: Setting, model_chunk: ModelChunk, memory: ModelChunkMemory, hardware: Hardware
) -> dict[str, float]:
    """Seconds of one micro batch in one model chunk on one rank, by term."""
    flops, traffic = model_chunk_flops(setting, model_chunk), model_chunk_traffic(setting, model_chunk)
    peak = hardware.peak_tflops * 1e12
    fp8 = flops.fp8_linear / hardware.fp8_gain if flops.fp8_linear else 0.0
    forward = flops.attention_forward / (peak * hardware.attention_forward_share)
    backward = flops.attention_backward / (peak * hardware.attention_backward_share)
    tower = flops.tower_linear / (peak * hardware.gemm_share)
    tower += flops.tower_attention_bytes / (peak * hardware.tower_attention_share)
    moved = memory.layers.moved_forward_bytes + memory.layers.moved_backward_bytes
    tower_moved = memory.tower.moved_bytes if memory.tower else 0.0
    memory_rate = hardware.memory_gb_s * 1e9 * hardware.memory_share
    return {
        "decoder linears": (flops.linear + fp8) / (peak * hardware.gemm_share),
        "attention": forward + backward,
        "head and loss": flops.head / (peak * hardware.gemm_share),
        "vision tower": tower + tower_moved / memory_rate,
        "element-wise": moved / memory_rate,
        **exposed_seconds(setting, model_chunk, traffic, hardware, attention=(forward, backward)),
        "offload": 2 * memory.layers.host_bytes / (hardware.host_gb_s * 1e9 * hardware.link_share),
    }


def exposed_seconds(
    setting: Setting,
    model_chunk: ModelChunk,
    traffic: ModelChunkTraffic,
    hardware: Hardware,
    *,
    attention: tuple[float, float],
) -> dict[str, float]:
    """Communication of one micro batch that nothing hides.

    p2p: (cp - 1) / cp of the attention's time runs while hops are under way. all_gather overlaps the rank's own block,
    1 / cp; a2a overlaps nothing. Each hop or collective also has a fixed cost.
    """
    plan, comm = setting.plan, setting.config.parallel.cp_comm_type
    tp_rate = group_gb_s(hardware, size=plan.tp, stride=1) * 1e9
    rate = hop_gb_s if comm == "p2p" else group_gb_s
    cp_rate = rate(hardware, size=plan.cp, stride=plan.tp) * 1e9
    hidden = {"p2p": (plan.cp - 1) / plan.cp, "all_gather": 1 / plan.cp}.get(comm, 0.0)
    calls = (plan.cp - 1 if comm == "p2p" else 1) * (plan.cp > 1)
    fixed = calls * model_chunk.num_layers * (forward_passes(setting) + 2) * hardware.launch_us * 1e-6
    cp = sum(
        max(0.0, sent / cp_rate - hidden * compute)
        for sent, compute in zip(
            (traffic.cp_forward_bytes, traffic.cp_backward_bytes), attention, strict=True
        )
    )
    tile_rate = group_gb_s(hardware, size=plan.tp * plan.cp, stride=1) * 1e9
    tp_calls = 8 * model_chunk.num_layers * (plan.tp > 1)
    experts = {}
    if traffic.ep_bytes:
        ep_rate = group_gb_s(hardware, size=plan.ep, stride=plan.etp) * 1e9
        experts["expert parallel traffic"] = traffic.ep_bytes / ep_rate
    return {
        **experts,
        "tensor parallel traffic": traffic.tp_bytes / tp_rate + tp_calls * hardware.launch_us * 1e-6,
        "context parallel traffic": cp + fixed,
        "feature router": traffic.router_bytes / tile_rate,
        "pipeline traffic": traffic.pp_bytes
        / (hop_gb_s(hardware, size=plan.pp, stride=plan.tp * plan.cp * plan.dp) * 1e9),
    }


def once_a_step_seconds(
    setting: Setting,
    traffic: StepTraffic,
    hardware: Hardware,
    *,
    trained: int,
    experts: int = 0,
    micro_batches: int,
) -> dict[str, float]:
    """Gradients, weights and optimizer, once a step, and the accumulation of gradients of each micro batch.

    Args:
        setting: the run.
        traffic: of the step.
        hardware: the GPU.
        trained: trained numbers of the rank.
        experts: those of them in experts, whose optimizer is shared over fewer ranks.
        micro_batches: of a data parallel rank.
    """
    plan = setting.plan
    sharing = plan.dp * plan.cp
    rate = group_gb_s(hardware, size=sharing, stride=plan.tp) * 1e9
    memory_rate = hardware.memory_gb_s * 1e9 * hardware.memory_share
    tp_rate = group_gb_s(hardware, size=plan.tp, stride=1) * 1e9
    return {
        "gradients and weights over dp, cp": (traffic.gradients_bytes + traffic.weights_bytes) / rate
        + traffic.tp_sum_bytes / tp_rate,
        "optimizer": OPTIMIZER_BYTES
        * ((trained - experts) / sharing + experts / plan.expert_dp)
        / memory_rate,
        "gradient accumulation": ACCUMULATION_BYTES * trained * micro_batches / memory_rate,
    }


def step_time(
    stages: list[dict[str, float]], per_step: dict[str, float], *, micro_batches: int, pp: int, vpp: int
) -> StepTime:
    """Put a step together: the slowest stage works on every micro batch, and waits (pp - 1) / vpp more of them."""
    seconds = tuple(sum(stage.values()) for stage in stages)
    slowest = max(range(len(stages)), key=lambda index: seconds[index])
    terms = {name: micro_batches * value for name, value in stages[slowest].items()}
    terms["pipeline bubble"] = (pp - 1) / vpp * seconds[slowest]
    return StepTime(terms={**terms, **per_step}, stage_seconds=seconds, slowest=slowest)
