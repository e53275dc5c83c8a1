"""A step's numbers as one line, and the heartbeat for people; sinks (see `sinks`) take the line where it goes.

Rank 0 writes. Counts are those of the global batch (see `counts`), so every line is the same whatever the layout.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_v2pe.train.metrics.sinks import Sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl; what every field means stands in docs/metrics.md.

    Tokens exclude padding of documents; rates are over the whole world. Of a step that was not applied, numbers that
    are not finite are None (null in json); what was not measured is None too.
    """

    step: int
    is_applied: bool
    loss: float | None
    loss_by_source: dict[str, float | None]
    weight_by_source: dict[str, float | None]
    tokens_by_source: dict[str, int]
    grad_norm: float | None
    grad_norm_vision: float | None
    grad_norm_projector: float | None
    grad_norm_language: float | None
    lr: float
    tokens: int
    visual_tokens: int
    supervised_tokens: int
    padding_share: float
    packs: int
    samples: int
    bad_samples: int
    max_position: int
    stride_min: int
    stride_mean: float
    stride_max: int
    tiles: int
    max_tiles_per_rank: int
    imbalance: float
    data_digest: str
    tokens_per_s: float
    visual_tokens_per_s: float
    supervised_tokens_per_s: float
    tflops_per_rank: float
    tflops_per_rank_full_attention: float
    mfu: float | None
    mfu_full_attention: float | None
    step_s: float
    data_s: float
    data_s_max: float
    data_s_max_rank: int
    save_s: float = 0.0
    comm_wait_s_min: float | None
    comm_wait_s_max: float | None
    straggler: int | None
    straggler_s: float | None
    peak_mem_gib: float
    peak_mem_rank: int
    reserved_mem_gib: float | None


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
        self._lost: dict[int, list[float]] = defaultdict(list)  # by straggler, since the last heartbeat

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
        if metrics.straggler is not None and metrics.straggler_s is not None:
            self._lost[metrics.straggler].append(metrics.straggler_s)
        if metrics.step % self.log_every == 0 or metrics.step == self.total_steps:
            logger.info(self._heartbeat(metrics))
            self._lost.clear()

    def _heartbeat(self, metrics: StepMetrics) -> str:
        left = round((self.total_steps - metrics.step) * self.seconds_per_step)
        slow = ""
        is_late = metrics.data_s_max > 0.1 * (metrics.step_s + metrics.data_s)
        if is_late and metrics.data_s_max_rank != 0:  # whose own wait is in the line
            slow = f" (rank {metrics.data_s_max_rank}: {metrics.data_s_max:.2f} s)"
        return (
            f"step {metrics.step}/{self.total_steps}  loss {_shown(metrics.loss, 4)}  "
            f"grad norm {_shown(metrics.grad_norm, 3)}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  step {metrics.step_s:.2f} s  data {metrics.data_s:.2f} s{slow}  "
            f"memory {metrics.peak_mem_gib:.1f} GiB  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            f"{self._straggler()}"
        )

    def _straggler(self) -> str:
        """The rank that cost the others most since the last heartbeat; empty when none did."""
        if not self._lost:
            return ""
        rank, seconds = max(self._lost.items(), key=lambda item: sum(item[1]))
        steps = "1 step" if len(seconds) == 1 else f"{len(seconds)} steps"
        return f"  STRAGGLER rank {rank}: the others waited {sum(seconds):.2f} s for it in {steps}"

    def close(self) -> None:
        """Flush the sinks."""
        for sink in self.sinks:
            sink.close()


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
