"""Which rank the others wait for: the one that waited least in communication while they waited.

    waits of a step by rank   0.9  0.8  0.1  0.9    --> rank 2; the median of the others waited 0.8 s longer

A rank may be slow because its data came late, because it has more to do (a heavier pipeline stage), or because its
machine is slower. Where ranks meet many times in a step (tp, cp), each of them waits; the slow one still waits least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_SHARE = 0.1  # of the step; less is noise, and pipelines of equal stages differ by as much


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that the others waited for.

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
