"""A step's numbers as one line, and the heartbeat for people; sinks (see `sinks`) take the line where it goes.

Rank 0 writes. Counts are those of the global batch (see `counts`), so every line is the same whatever the layout.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from megatron_v2pe.train.sinks import Sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Tokens exclude padding of documents; rates are over the whole world.

    `data_digest` is the sum of digests of the packs' samples: equal digests mean equal packs, whichever rank took them;
    `bad_samples` counts those that are skipped so far, found while measuring or while training. Of a step that was not
    applied, numbers that are not finite are None (null in json). `mfu` is `tflops_per_rank` over the device's peak,
    None where the peak is not known; `*_full_attention` count all pairs of a document, the others the causal half. The
    rest is explained at `counts.BatchCounts`.
    """

    step: int
    is_applied: bool
    loss: float | None
    grad_norm: float | None
    grad_norm_vision: float | None
    grad_norm_projector: float | None
    grad_norm_language: float | None
    lr: float
    tokens: int
    visual_tokens: int
    supervised_tokens: int
    padding_share: float
    samples: int
    bad_samples: int
    max_position: int
    stride_min: int
    stride_mean: float
    stride_max: int
    max_tiles_per_rank: int
    imbalance: float
    data_digest: str
    tokens_per_s: float
    tflops_per_rank: float
    tflops_per_rank_full_attention: float
    mfu: float | None
    mfu_full_attention: float | None
    step_s: float
    data_s: float
    data_s_max: float
    data_s_max_rank: int
    peak_mem_gib: float


def peak_memory_gib() -> float:
    """Most memory of this process so far: allocated device memory, or resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def finite(value: float) -> float | None:
    """The number, or None where json has no spelling for it."""
    return value if math.isfinite(value) else None


class MetricsLog:
    """Hands one step's metrics to all sinks and says a line when it is due; without sinks it does nothing.

    Args:
        sinks: of rank 0; other ranks have none.
        log_every: steps between heartbeat lines.
        total_steps: for the estimate of the time left.
    """

    def __init__(self, sinks: Sequence[Sink], *, log_every: int, total_steps: int) -> None:
        self.sinks, self.log_every, self.total_steps = sinks, log_every, total_steps
        self.seconds_per_step = 0.0

    def write(self, metrics: StepMetrics) -> None:
        """Give the line away, print the heartbeat when due."""
        if not self.sinks:
            return
        for sink in self.sinks:
            sink.write(asdict(metrics))
        seconds = metrics.step_s + metrics.data_s
        self.seconds_per_step = (
            seconds if self.seconds_per_step == 0 else 0.9 * self.seconds_per_step + 0.1 * seconds
        )
        if metrics.step % self.log_every == 0 or metrics.step == self.total_steps:
            logger.info(self._heartbeat(metrics))

    def _heartbeat(self, metrics: StepMetrics) -> str:
        left = round((self.total_steps - metrics.step) * self.seconds_per_step)
        slow = ""
        if metrics.data_s_max > 0.1 * seconds_of(metrics):  # all others waited for this rank
            slow = f" (rank {metrics.data_s_max_rank}: {metrics.data_s_max:.2f} s)"
        return (
            f"step {metrics.step}/{self.total_steps}  loss {_shown(metrics.loss, 4)}  "
            f"grad norm {_shown(metrics.grad_norm, 3)}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  step {metrics.step_s:.2f} s  data {metrics.data_s:.2f} s{slow}  "
            f"memory {metrics.peak_mem_gib:.1f} GiB  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )

    def close(self) -> None:
        """Flush the sinks."""
        for sink in self.sinks:
            sink.close()


def seconds_of(metrics: StepMetrics) -> float:
    """Wall time of a step with its wait for data."""
    return metrics.step_s + metrics.data_s


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
