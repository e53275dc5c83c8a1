"""Which rank the others wait for: the one that waited least in communication while they waited.

    waits of a step by rank   0.9  0.8  0.1  0.9    --> rank 2; the median of the others waited 0.8 s longer
    steps of three windows    2 2 2 - 2 ...         --> rank 2 is slow: it is reported, once

A rank may be slow because its data came late, because it has more to do (a heavier pipeline stage), or because its
machine is slower. Where ranks meet many times in a step (tp, cp), each of them waits; the slow one still waits least.
Single steps say little: on a healthy machine one rank or another comes late in most of them.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LEAST_SHARE = 0.1  # of the step; less is noise, and pipelines of equal stages differ by as much
_WINDOW = 10  # measured steps
_MOST_OF_A_WINDOW = 8  # steps of it in which the others wait for the same rank
_NUM_WINDOWS = 3  # in a row


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that the others waited for in one step.

    Attributes:
        rank: global rank.
        seconds: how much longer than this rank the median of the others waited.
    """

    rank: int
    seconds: float


def find_straggler(waits: Sequence[float], *, step_seconds: float) -> Straggler | None:
    """The straggler of a step, if there is one that matters.

    Args:
        waits: communication wait of each rank in seconds, by rank; NaN where it was not measured.
        step_seconds: wall time of the step.
    """
    if len(waits) < 2 or not all(map(math.isfinite, waits)):
        return None
    rank = min(range(len(waits)), key=waits.__getitem__)
    others = statistics.median(wait for other, wait in enumerate(waits) if other != rank)
    lost = others - waits[rank]
    return Straggler(rank=rank, seconds=lost) if lost > _LEAST_SHARE * step_seconds else None


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank that the others wait for again and again.

    Attributes:
        rank: global rank.
        from_step: first step of the windows in which it was noticed.
        to_step: last step of them.
        share: of the time of these windows, what the others waited for it.
    """

    rank: int
    from_step: int
    to_step: int
    share: float


class SlowRankFinder:
    """Finds ranks that are slow in several windows of steps in a row; each is found once."""

    def __init__(self) -> None:
        self._window: list[Mapping[str, Any]] = []
        self._slow: list[SlowRank] = []  # of the last windows, all of the same rank
        self._found: set[int] = set()

    def after_step(self, line: Mapping[str, Any]) -> SlowRank | None:
        """The rank that is found slow with this line of metrics; None for nearly all lines.

        Args:
            line: of metrics.jsonl; lines without measured waits are passed over.
        """
        if line.get("comm_wait_s_max") is None:
            return None
        self._window.append(line)
        if len(self._window) < _WINDOW:
            return None
        slow = _slow_rank(self._window)
        self._window = []
        if slow is None or any(slow.rank != each.rank for each in self._slow):
            self._slow = []
        if slow is None:
            return None
        self._slow = [*self._slow, slow][-_NUM_WINDOWS:]
        if len(self._slow) < _NUM_WINDOWS or slow.rank in self._found:
            return None
        self._found.add(slow.rank)
        return SlowRank(
            rank=slow.rank,
            from_step=self._slow[0].from_step,
            to_step=slow.to_step,
            share=statistics.mean(each.share for each in self._slow),
        )


def _slow_rank(window: Sequence[Mapping[str, Any]]) -> SlowRank | None:
    """The rank that the others waited for in most steps of a window, and for a share of its time."""
    rank, count = Counter(line["straggler"] for line in window).most_common(1)[0]
    if rank is None or count < _MOST_OF_A_WINDOW:
        return None
    lost = math.fsum(line["straggler_s"] for line in window if line["straggler"] == rank)
    share = lost / math.fsum(line["step_s"] + line["data_s"] for line in window)
    if share < _LEAST_SHARE:
        return None
    return SlowRank(rank=rank, from_step=window[0]["step"], to_step=window[-1]["step"], share=share)
