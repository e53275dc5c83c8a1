"""Measures a step and makes its line of metrics: what was trained on, how fast, and who waited for whom.

    with meter.measured(step):   mask_damaged + train_step     wall time and communication wait of this rank
    meter.line(...)              StepReport + packs --two small collectives--> {name: number}, on all ranks

Rates are over the step and this rank's wait for its data; a wait for another rank's data is inside the step.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.parallel.runtime.comm_clock import CommClock
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.metrics.batch_stats import BatchStats, count_batches
from megatron_v2pe.train.metrics.stragglers import find_straggler
from megatron_v2pe.train.step import StepReport


class StepMeter:
    """Makes the metrics of one step after the other. Every rank must ask for every step.

    Args:
        arch: architecture of the checkpoint, for FLOPs.
        ranks: this rank's place.
        peak_tflops: dense peak of this device, for MFU; None where it is not known.
    """

    def __init__(self, arch: InternVLArchitecture, *, ranks: Ranks, peak_tflops: float | None) -> None:
        self._arch = arch
        self._ranks = ranks
        self._peak_tflops = peak_tflops
        self._clock = CommClock(ranks.device)
        self._step_s = 0.0

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Time the block, which is the step without the wait for its data."""
        started = time.perf_counter()
        with self._clock.measured(step):
            yield
        self._step_s = time.perf_counter() - started

    def line(
        self, report: StepReport, batches: Sequence[PackedBatch], *, step: int, data_s: float
    ) -> dict[str, Any]:
        """Numbers of the step that was measured last, by their names in metrics.jsonl. Collective.

        Equal on every rank but for this rank's own times. What is not finite is None.

        Args:
            report: what the step did.
            batches: this data parallel rank's packs.
            step: 1-based.
            data_s: how long this rank waited for them, seconds.
        """
        row = {
            "data_s": data_s,
            "comm_wait_s": self._clock.seconds(),
            "peak_mem_gib": peak_memory_gib(),
            "reserved_mem_gib": reserved_memory_gib(),
        }
        stats = count_batches(batches, self._arch, ranks=self._ranks, row=row)
        line = {
            "step": step,
            **report.numbers(),
            **stats.numbers,
            **self._speed(stats, wall_s=self._step_s + data_s),
            "step_s": self._step_s,
            "data_s": data_s,
            **_numbers_of_ranks(stats.by_rank, wall_s=self._step_s + data_s),
        }
        return {name: finite(value) for name, value in line.items()}

    def _speed(self, stats: BatchStats, *, wall_s: float) -> dict[str, float | None]:
        kinds = ("tokens", "visual_tokens", "supervised_tokens")
        rates: dict[str, float | None] = {f"{kind}_per_s": stats.numbers[kind] / wall_s for kind in kinds}
        for suffix, flops in (("", stats.flops), ("_full_attention", stats.flops_full_attention)):
            tflops = flops / (1e12 * wall_s * self._ranks.world_size)
            rates[f"tflops_per_rank{suffix}"] = tflops
            rates[f"mfu{suffix}"] = tflops / self._peak_tflops if self._peak_tflops else None
        return rates


def _numbers_of_ranks(by_rank: Mapping[str, Sequence[float]], *, wall_s: float) -> dict[str, Any]:
    """Extremes over ranks and where they are.

    Args:
        by_rank: values of every rank, by name.
        wall_s: of the step with its wait for data.
    """
    data, waits, memory = by_rank["data_s"], by_rank["comm_wait_s"], by_rank["peak_mem_gib"]
    straggler = find_straggler(waits, step_seconds=wall_s)
    return {
        "data_s_max": max(data),
        "data_s_max_rank": data.index(max(data)),
        "comm_wait_s_min": min(waits),
        "comm_wait_s_max": max(waits),
        "straggler": straggler.rank if straggler else None,
        "straggler_s": straggler.seconds if straggler else None,
        "peak_mem_gib": max(memory),
        "peak_mem_rank": memory.index(max(memory)),
        "reserved_mem_gib": max(by_rank["reserved_mem_gib"]),
    }


def timed_batches(loader: Iterable[list[PackedBatch]]) -> Iterator[tuple[list[PackedBatch], float]]:
    """Packs of each step with the seconds that were spent waiting for them."""
    iterator = iter(loader)
    while True:
        started = time.perf_counter()
        batches = next(iterator, None)
        if batches is None:
            return
        yield batches, time.perf_counter() - started


def peak_memory_gib() -> float:
    """Most memory of this process so far: allocated device memory, or resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def reserved_memory_gib() -> float:
    """Most memory that the device's allocator has held so far; NaN on CPU, where nobody keeps that number."""
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else math.nan


def finite(value: Any) -> Any:
    """The value, or None where it is a number that json has no spelling for; a mapping with each of its values so."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
