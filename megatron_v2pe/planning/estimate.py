"""The whole plan of a run: memory of every pipeline rank, FLOPs, traffic and time of a step.

RunConfig + architecture + GPUs --estimate--> Estimate --report--> table or json
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import step_flops
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.fp8 import pack_multiple
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_sharding
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.plan import ParallelPlan, resolve
from megatron_v2pe.planning.memory.activations import (
    ModelChunkMemory,
    Phase,
    model_chunk_memory,
    model_chunk_phases,
)
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.memory.state import (
    GRADIENT_BYTES,
    StateBytes,
    TrainedNumbers,
    frozen_parts,
    rank_state,
    trained_numbers,
)
from megatron_v2pe.planning.request.hardware import GIB, H100, Hardware
from megatron_v2pe.planning.request.stages import ModelChunk, forwards_in_flight, model_chunks_of_rank
from megatron_v2pe.planning.request.workload import Pack
from megatron_v2pe.planning.time.compute import model_chunk_flops
from megatron_v2pe.planning.time.step_time import (
    StepTime,
    micro_batch_seconds,
    once_a_step_seconds,
    step_time,
)
from megatron_v2pe.planning.time.traffic import StepTraffic, model_chunk_traffic, step_traffic


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one pipeline rank (of its tp, cp and dp copies the first).

    Attributes:
        pp_rank: which.
        model_chunks: its model chunks.
        state: weights, gradients, optimizer.
        phases: a micro batch's phases, with what other micro batches in flight keep.
        in_flight: micro batches (forward passes of model chunks) held at a time.
        host_bytes: activations that were moved to host memory.
        reserved_bytes: context, libraries.
        fragmentation_share: of the activations.
    """

    pp_rank: int
    model_chunks: tuple[ModelChunk, ...]
    state: StateBytes
    phases: tuple[Phase, ...]
    in_flight: int
    host_bytes: float
    reserved_bytes: float
    fragmentation_share: float

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def lost_bytes(self) -> float:
        """What the allocator loses between blocks."""
        return self.fragmentation_share * self.peak.total_bytes

    @property
    def total_bytes(self) -> float:
        """State, activations at their peak, what the allocator loses, and the reserve."""
        return self.state.total_bytes + self.peak.total_bytes + self.lost_bytes + self.reserved_bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Everything the planner says about a run.

    Attributes:
        setting: the run and its fullest pack.
        hardware: the GPU.
        ranks: memory of every pipeline rank.
        micro_batches: packs of a data parallel rank in a step.
        model_flops: of a step, causal attention.
        full_flops: of a step, attention counted as a whole square.
        executed_flops: of a step, all ranks.
        traffic: bytes a rank sends in a step, by kind, on the busiest stage.
        time: of a step.
    """

    setting: Setting
    hardware: Hardware
    ranks: tuple[RankMemory, ...]
    micro_batches: int
    model_flops: float
    full_flops: float
    executed_flops: float
    traffic: dict[str, float]
    time: StepTime

    @property
    def plan(self) -> ParallelPlan:
        """Sizes of the axes."""
        return self.setting.plan

    @property
    def fullest(self) -> RankMemory:
        """The pipeline rank that needs most."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def room_bytes(self) -> float:
        """What is left on the fullest rank; negative when it does not fit."""
        return self.hardware.memory_gib * GIB - self.fullest.total_bytes

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.room_bytes >= 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its time, per GPU."""
        tokens = self.setting.pack.num_tokens * self.micro_batches * self.plan.dp
        return tokens / self.time.seconds / self.plan.world_size

    def utilisation(self, flops: float) -> float:
        """Share of the peak that `flops` of a step are."""
        peak = self.hardware.peak_tflops * 1e12 * self.plan.world_size
        return flops / (self.time.seconds * peak)


def backend_of(config: RunConfig, arch: InternVLArchitecture) -> str:
    """The back end on a GPU cluster: `auto` means Transformer Engine there, native layers in float32.

    Raises:
        ConfigError: it cannot cut packs as `parallel.cp_sharding` asks.
    """
    backend = config.parallel.attention_backend
    if backend == "auto":
        backend = "transformer_engine" if config.runtime.dtype == "bfloat16" else "native"
    check_sharding(config.parallel, "native" if arch.language.sinks else backend)
    return backend


def check_hardware(config: RunConfig, hardware: Hardware) -> None:
    """The GPU has what the run asks for.

    Raises:
        ConfigError: it has no FP8 products.
    """
    if config.model.fp8 != "none" and not hardware.fp8_gain:
        raise ConfigError(
            f"model.fp8 is {config.model.fp8!r}, but {hardware.name} has no FP8 products; set model.fp8 to none, "
            "or plan for another GPU"
        )


def estimate(
    config: RunConfig, arch: InternVLArchitecture, pack: Pack, *, gpus: int, hardware: Hardware
) -> Estimate:
    """Plan a run; the configuration must be valid for that many GPUs (`config.validate`).

    Args:
        config: the run.
        arch: its model.
        pack: micro batch that memory has to hold and time is worked out for.
        gpus: ranks of the run.
        hardware: one of them.

    Raises:
        ConfigError: the GPU or the back end cannot do what the run asks for.
    """
    check_hardware(config, hardware)
    plan = resolve(config.parallel, gpus)
    padded = pack.padded(plan, pack_multiple=pack_multiple(config))
    setting = Setting(config=config, arch=arch, plan=plan, pack=padded, backend=backend_of(config, arch))
    step_packs = batch_schedule(config).full_size
    micro_batches = step_packs // plan.dp
    stages = [
        model_chunks_of_rank(config.parallel, arch.language.num_layers, plan, rank) for rank in range(plan.pp)
    ]
    known = {
        model_chunk: model_chunk_memory(setting, model_chunk)
        for model_chunks in stages
        for model_chunk in model_chunks
    }
    ranks = tuple(
        rank_memory(setting, rank, model_chunks, known, micro_batches, hardware)
        for rank, model_chunks in enumerate(stages)
    )
    packs = [setting.pack.counts] * step_packs
    per_pack = sum(
        model_chunk_flops(setting, model_chunk).total
        for model_chunks in stages
        for model_chunk in model_chunks
    )
    time, traffic = _time(setting, stages, known, ranks, micro_batches, hardware)
    return Estimate(
        setting=setting,
        hardware=hardware,
        ranks=ranks,
        micro_batches=micro_batches,
        model_flops=step_flops(arch, packs),
        full_flops=step_flops(arch, packs, full_attention=True),
        executed_flops=per_pack * plan.tp * plan.cp * step_packs,
        traffic=traffic,
        time=time,
    )


def rank_memory(
    setting: Setting,
    pp_rank: int,
    model_chunks: tuple[ModelChunk, ...],
    known: dict[ModelChunk, ModelChunkMemory],
    micro_batches: int,
    hardware: Hardware,
) -> RankMemory:
    """Memory of a pipeline rank: state, and its model chunks' phases on top of what is in flight."""
    plan, arch = setting.plan, setting.arch
    state = rank_state(setting.config, arch, plan, pp_rank * plan.tp * plan.cp * plan.dp)
    held = forwards_by_model_chunk(plan, pp_rank, micro_batches)
    kept = {index: known[model_chunk].kept_bytes for index, model_chunk in enumerate(model_chunks)}
    hidden = setting.rows * arch.language.hidden_size * setting.element_bytes
    phases = []
    for index, model_chunk in enumerate(model_chunks):
        others = sum(count * kept[other] for other, count in held.items()) - kept[index]
        for phase in model_chunk_phases(known[model_chunk], hidden):
            parts = {**phase.parts, "other micro batches in flight": max(0.0, others)}
            phases.append(Phase(name=phase.name, parts=parts if plan.pp > 1 else phase.parts))
    summed = trained_numbers(
        arch, plan, model_chunks, frozen_parts(setting.config), setting.config.lora
    ).summed_over_tp
    if summed:
        parts = {"copy of gradients summed over tp": float(summed * GRADIENT_BYTES)}
        phases.append(Phase(name="reduce", parts=parts))
    return RankMemory(
        pp_rank=pp_rank,
        model_chunks=model_chunks,
        state=state,
        phases=tuple(phases),
        in_flight=sum(held.values()),
        host_bytes=sum(count * known[model_chunks[index]].layers.host_bytes for index, count in held.items()),
        reserved_bytes=hardware.reserved_gib * GIB,
        fragmentation_share=hardware.fragmentation_share,
    )


def forwards_by_model_chunk(plan: ParallelPlan, pp_rank: int, micro_batches: int) -> dict[int, int]:
    """Forward passes held, by model chunk: the first ones of the schedule, pp micro batches of each in turn."""
    counts: dict[int, int] = {}
    for number in range(forwards_in_flight(plan, pp_rank, micro_batches)):
        model_chunk = number // plan.pp % plan.vpp if plan.vpp > 1 else 0
        counts[model_chunk] = counts.get(model_chunk, 0) + 1
    return counts


def _time(
    setting: Setting,
    stages: list[tuple[ModelChunk, ...]],
    known: dict[ModelChunk, ModelChunkMemory],
    ranks: tuple[RankMemory, ...],
    micro_batches: int,
    hardware: Hardware,
) -> tuple[StepTime, dict[str, float]]:
    """Time of a step, and the busiest stage's traffic."""
    per_stage = []
    for model_chunks in stages:
        terms: dict[str, float] = {}
        for model_chunk in model_chunks:
            for name, value in micro_batch_seconds(
                setting, model_chunk, known[model_chunk], hardware
            ).items():
                terms[name] = terms.get(name, 0.0) + value
        per_stage.append(terms)
    once = _once(setting, stages, ranks)
    busiest = max(range(len(once)), key=lambda index: once[index][1].gradients_bytes)
    trained, traffic = once[busiest]
    per_step = once_a_step_seconds(
        setting,
        traffic,
        hardware,
        trained=trained.all,
        experts=trained.experts,
        micro_batches=micro_batches,
    )
    plan = setting.plan
    time = step_time(per_stage, per_step, micro_batches=micro_batches, pp=plan.pp, vpp=plan.vpp)
    return time, _sent(setting, stages[time.slowest], once[time.slowest][1], micro_batches)


def _once(
    setting: Setting, stages: list[tuple[ModelChunk, ...]], ranks: tuple[RankMemory, ...]
) -> list[tuple[TrainedNumbers, StepTraffic]]:
    """Trained numbers and once-a-step traffic of every stage."""
    frozen = frozen_parts(setting.config)
    found = []
    for model_chunks, rank in zip(stages, ranks, strict=True):
        trained = trained_numbers(setting.arch, setting.plan, model_chunks, frozen, setting.config.lora)
        traffic = step_traffic(
            setting,
            gradients_bytes=rank.state.gradients_bytes,
            weights_bytes=rank.state.gradients_bytes // GRADIENT_BYTES * setting.element_bytes,
            tp_summed=trained.summed_over_tp,
        )
        found.append((trained, traffic))
    return found


def _sent(
    setting: Setting, model_chunks: tuple[ModelChunk, ...], once: StepTraffic, micro_batches: int
) -> dict[str, float]:
    """Bytes that a rank of a stage sends in a step, by kind."""
    each = [model_chunk_traffic(setting, model_chunk) for model_chunk in model_chunks]
    expert_bytes = micro_batches * sum(part.ep_bytes for part in each)
    return {
        **({"expert parallel": expert_bytes} if expert_bytes else {}),
        "tensor parallel": micro_batches * sum(part.tp_bytes for part in each),
        "context parallel": micro_batches
        * sum(part.cp_forward_bytes + part.cp_backward_bytes for part in each),
        "feature router": micro_batches * sum(part.router_bytes for part in each),
        "pipeline": micro_batches * sum(part.pp_bytes for part in each),
        "gradients over dp, cp": once.gradients_bytes,
        "weights over dp, cp": once.weights_bytes,
        "gradients summed over tp": once.tp_sum_bytes,
    }


def activation_peak(setting: Setting, *, pp_rank: int = 0, micro_batches: int = 1) -> Phase:
    """The fullest phase of a pipeline rank, state excluded: what is compared with measured steps.

    Args:
        setting: the run; `on_cpu` for a step that is measured on a CPU.
        pp_rank: pipeline rank.
        micro_batches: of a step.
    """
    plan, layers = setting.plan, setting.arch.language.num_layers
    model_chunks = model_chunks_of_rank(setting.config.parallel, layers, plan, pp_rank)
    known = {model_chunk: model_chunk_memory(setting, model_chunk) for model_chunk in model_chunks}
    return rank_memory(setting, pp_rank, model_chunks, known, micro_batches, H100).peak
