"""A step's numbers as one line of metrics, and a short line of them for people; sinks (see `sinks`) write the first.

Rank 0 writes. Counts are those of the global batch (see `batch_stats`), so every line is the same whatever the layout.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_v2pe.train.metrics.sinks import Sink
from megatron_v2pe.train.metrics.stragglers import SlowRankFinder

logger = logging.getLogger(__name__)

_RECENT_STEPS = 20  # whose mean time the estimate of the time left is made of
_NOTED_WAIT = 0.1  # of a step's time; a shorter wait for data is in metrics.jsonl only


class MetricsLog:
    """Hands one step's metrics to all sinks and logs a line when it is due; without sinks it does nothing.

    Args:
        sinks: of rank 0; other ranks have none.
        log_every: steps between lines of the log.
        total_steps: for the estimate of the time left.
    """

    def __init__(self, sinks: Sequence[Sink], *, log_every: int, total_steps: int) -> None:
        self._sinks = sinks
        self._log_every = log_every
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._is_first = True
        self._slow_ranks = SlowRankFinder()

    def write(self, line: Mapping[str, Any]) -> None:
        """Write a step's numbers, by their names in metrics.jsonl; log them when due, and a slow rank once."""
        if not self._sinks:
            return
        for sink in self._sinks:
            sink.write(line)
        self._remember_time(line)
        if line["step"] % self._log_every == 0 or line["step"] == self._total_steps:
            logger.info("%s", self._text(line))
        if slow := self._slow_ranks.after_step(line):
            logger.warning(
                "STRAGGLER rank %d: in steps %d to %d the others waited for it %.0f %% of the time; its data is late, "
                "it has more to do, or its machine is slower (logged once; `megatron-v2pe runs` has the figures)",
                slow.rank,
                slow.from_step,
                slow.to_step,
                100 * slow.share,
            )

    def close(self) -> None:
        """Flush the sinks."""
        for sink in self._sinks:
            sink.close()

    def _remember_time(self, line: Mapping[str, Any]) -> None:
        """The first step of a process is longer than others, so it counts only while there is no other."""
        if len(self._seconds) == 1 and self._is_first:
            self._seconds.clear()
            self._is_first = False
        self._seconds.append(line["step_s"] + line["data_s"] + line["save_s"])

    def _text(self, line: Mapping[str, Any]) -> str:
        """About 100 columns; all numbers are in metrics.jsonl."""
        left = round((self._total_steps - line["step"]) * statistics.mean(self._seconds))
        parts = [
            f"step {line['step']}/{self._total_steps}",
            f"loss {_shown(line['loss'], 4)}",
            f"grad norm {_shown(line['grad_norm'], 2)}",
            f"lr {line['lr']:.1e}",
            f"{line['tokens_per_s']:,.0f} tokens/s",
            f"{line['step_s']:.2f} s",
            _data_wait(line),
            f"{line['peak_mem_gib']:.1f} GiB",
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}",
        ]
        return "  ".join(part for part in parts if part)


def _data_wait(line: Mapping[str, Any]) -> str:
    """The longest wait for data and its rank, where it is a share of the step; empty otherwise."""
    if line["data_s_max"] <= _NOTED_WAIT * (line["step_s"] + line["data_s"]):
        return ""
    rank = line["data_s_max_rank"]
    return f"data {line['data_s_max']:.2f} s" + (f" (rank {rank})" if rank else "")


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
