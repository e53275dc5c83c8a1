"""An estimate as plain data for programs; bytes, seconds and FLOPs, nothing rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.planning.changes import Variant, override_text
from megatron_v2pe.planning.estimate import Estimate, RankMemory
from megatron_v2pe.planning.memory.inference import InferenceMemory
from megatron_v2pe.planning.request.hardware import GIB
from megatron_v2pe.planning.search import shown_overrides


def rank_data(rank: RankMemory) -> dict[str, Any]:
    """Memory of a pipeline rank."""
    return {
        "stage": rank.pp_rank,
        "decoder_layers": sum(model_chunk.num_layers for model_chunk in rank.model_chunks),
        "weights_bytes": rank.state.weights_bytes,
        "fp8_weights_bytes": rank.state.fp8_bytes,
        "gradients_bytes": rank.state.gradients_bytes,
        "optimizer_bytes": rank.state.optimizer_bytes,
        "peak_phase": rank.peak.name,
        "activations_bytes": rank.peak.total_bytes,
        "activations": rank.peak.parts,
        "phases_bytes": {phase.name: phase.total_bytes for phase in rank.phases},
        "in_flight": rank.in_flight,
        "host_bytes": rank.host_bytes,
        "lost_bytes": rank.lost_bytes,
        "reserved_bytes": rank.reserved_bytes,
        "total_bytes": rank.total_bytes,
    }


def estimate_data(estimate: Estimate, name: str) -> dict[str, Any]:
    """Everything that the text report shows."""
    pack = estimate.setting.pack
    return {
        "model": name,
        "gpus": estimate.plan.world_size,
        "hardware": dataclasses.asdict(estimate.hardware),
        "layout": dataclasses.asdict(estimate.plan),
        "backend": estimate.setting.backend,
        "pack": {**dataclasses.asdict(pack), "num_tokens": pack.num_tokens},
        "micro_batches": estimate.micro_batches,
        "fits": estimate.fits,
        "memory_bytes": estimate.hardware.memory_gib * GIB,
        "room_bytes": estimate.room_bytes,
        "stages": [rank_data(rank) for rank in estimate.ranks],
        "model_flops": estimate.model_flops,
        "model_flops_full_attention": estimate.full_flops,
        "executed_flops": estimate.executed_flops,
        "sent_bytes": estimate.traffic,
        "step_seconds": estimate.time.seconds,
        "seconds": estimate.time.terms,
        "binds": estimate.time.binding,
        "tokens_per_s_per_gpu": estimate.tokens_per_s,
        "mfu": estimate.utilisation(estimate.model_flops),
        "mfu_full_attention": estimate.utilisation(estimate.full_flops),
    }


def variant_data(variant: Variant | None) -> dict[str, Any] | None:
    """Overrides and what they lead to."""
    if variant is None:
        return None
    return {
        "overrides": [override_text(override) for override in variant.overrides],
        "total_bytes": variant.estimate.fullest.total_bytes,
        "step_seconds": variant.estimate.time.seconds,
        "fits": variant.estimate.fits,
    }


def search_data(found: Sequence[Variant], config: RunConfig, *, count: int) -> list[dict[str, Any]]:
    """The best layouts."""
    rows = []
    for variant in found[:count]:
        estimate = variant.estimate
        rows.append(
            {
                "overrides": [override_text(override) for override in shown_overrides(variant, config)],
                "fits": estimate.fits,
                "total_bytes": estimate.fullest.total_bytes,
                "step_seconds": estimate.time.seconds,
                "tokens_per_s_per_gpu": estimate.tokens_per_s,
                "mfu": estimate.utilisation(estimate.model_flops),
                "binds": estimate.time.binding,
            }
        )
    return rows


def inference_data(memories: Sequence[InferenceMemory]) -> list[dict[str, Any]]:
    """Memory of generation, stage by stage."""
    return [{**dataclasses.asdict(memory), "total_bytes": memory.total_bytes} for memory in memories]
