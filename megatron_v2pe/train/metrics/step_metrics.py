"""Measures a step and makes its line: what was trained on, how fast, and who waited for whom.

    with meter.measured(step):   settle + train_step          wall time and communication wait of this rank
    meter.metrics(...)           StepReport + packs --two small collectives (`counts`)--> StepMetrics, on all ranks

Rates are over the step and this rank's wait for its data; a wait for another rank's data is inside the step.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.parallel.comm_clock import CommClock
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.metrics.batch_stats import BatchStats, RankRow, count_batches
from megatron_v2pe.train.metrics.metrics_log import StepMetrics
from megatron_v2pe.train.metrics.stragglers import find_straggler
from megatron_v2pe.train.step import StepReport


class StepMeter:
    """Makes the metrics of one step after the other. Every rank must ask for every step.

    Args:
        arch: architecture of the checkpoint, for FLOPs.
        ranks: this rank's place.
        peak_tflops: dense peak of this device, for MFU; None where it is not known.
        source_names: data sets in the order of `PackedBatch.sources`.
    """

    def __init__(
        self,
        arch: InternVLArchitecture,
        *,
        ranks: Ranks,
        peak_tflops: float | None,
        source_names: Sequence[str],
    ) -> None:
        self._arch, self._ranks, self._peak = arch, ranks, peak_tflops
        self._names = tuple(source_names)
        self._clock = CommClock(ranks.device)
        self._seconds = 0.0

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Time the block, which is the step behind the wait for its data."""
        started = time.perf_counter()
        with self._clock.measured(step):
            yield
        self._seconds = time.perf_counter() - started

    def metrics(
        self,
        report: StepReport,
        batches: Sequence[PackedBatch],
        *,
        step: int,
        data_seconds: float,
        bad_samples: int,
    ) -> StepMetrics:
        """The line of the step that was measured last. Collective.

        Args:
            report: what the step did.
            batches: this data parallel rank's packs.
            step: 1-based.
            data_seconds: how long this rank waited for them.
            bad_samples: samples that are skipped so far.
        """
        row = RankRow(
            data_s=data_seconds,
            comm_wait_s=self._clock.seconds(),
            peak_mem_gib=peak_memory_gib(),
            reserved_mem_gib=reserved_memory_gib(),
        )
        counts = count_batches(batches, self._arch, ranks=self._ranks, row=row)
        return self._line(report, counts, step=step, data_seconds=data_seconds, bad_samples=bad_samples)

    def _line(
        self, report: StepReport, counts: BatchStats, *, step: int, data_seconds: float, bad_samples: int
    ) -> StepMetrics:
        wall = self._seconds + data_seconds
        teraflops = 1e12 * wall * self._ranks.world_size
        rate, full_rate = counts.flops / teraflops, counts.flops_full_attention / teraflops
        waits = [row.comm_wait_s for row in counts.rows]
        straggler = find_straggler(waits, step_seconds=wall)
        data_waits = [row.data_s for row in counts.rows]
        memory = [row.peak_mem_gib for row in counts.rows]
        return StepMetrics(
            step=step,
            is_applied=report.is_applied,
            loss=finite(report.loss),
            loss_by_source=report.by_source.losses(self._names),
            weight_by_source=report.by_source.weight_shares(self._names),
            tokens_by_source=report.by_source.token_counts(self._names),
            grad_norm=finite(report.grad_norm),
            grad_norm_vision=finite(report.part_norms["vision"]),
            grad_norm_projector=finite(report.part_norms["projector"]),
            grad_norm_language=finite(report.part_norms["language"]),
            lr=report.lr,
            tokens=counts.tokens,
            visual_tokens=counts.visual_tokens,
            supervised_tokens=counts.supervised_tokens,
            padding_share=counts.padding_share,
            packs=counts.packs,
            samples=counts.samples,
            bad_samples=bad_samples,
            max_position=counts.max_position,
            stride_min=counts.stride_min,
            stride_mean=counts.stride_mean,
            stride_max=counts.stride_max,
            tiles=counts.tiles,
            max_tiles_per_rank=counts.max_tiles_per_rank,
            imbalance=counts.imbalance,
            data_digest=counts.data_digest,
            tokens_per_s=counts.tokens / wall,
            visual_tokens_per_s=counts.visual_tokens / wall,
            supervised_tokens_per_s=counts.supervised_tokens / wall,
            tflops_per_rank=rate,
            tflops_per_rank_full_attention=full_rate,
            mfu=rate / self._peak if self._peak else None,
            mfu_full_attention=full_rate / self._peak if self._peak else None,
            step_s=self._seconds,
            data_s=data_seconds,
            data_s_max=max(data_waits),
            data_s_max_rank=data_waits.index(max(data_waits)),
            comm_wait_s_min=finite(min(waits)),
            comm_wait_s_max=finite(max(waits)),
            straggler=straggler.rank if straggler else None,
            straggler_s=straggler.seconds if straggler else None,
            peak_mem_gib=max(memory),
            peak_mem_rank=memory.index(max(memory)),
            reserved_mem_gib=finite(max(row.reserved_mem_gib for row in counts.rows)),
        )


def peak_memory_gib() -> float:
    """Most memory of this process so far: allocated device memory, or resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def reserved_memory_gib() -> float:
    """Most memory that the device's allocator has held so far; NaN on CPU, where nobody keeps that number."""
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else math.nan


def finite(value: float) -> float | None:
    """The number, or None where json has no spelling for it."""
    return value if math.isfinite(value) else None
