"""What the processes of the race do: steps in turns, and steps of one rank of a layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sides import Ours, Plain, RaceSizes

LOSSES_AGREE = 1e-6  # relative; float32 sums in other orders, 1e-7 was seen


def turns(sides: dict[str, Callable[[], Any]], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Least processor time of a step in each turn of each side; a side steps once before, to warm up.

    Args:
        sides: name to step.
        repeats: turns of each side, one after the other's.
        seconds: processor time of a turn; it has at least one step.
    """
    least: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        for name, side in sides.items():
            end, best = time.process_time() + seconds, float("inf")
            while best == float("inf") or time.process_time() < end:
                started = time.process_time()
                side()
                best = min(best, time.process_time() - started)
            least[name].append(best)
    return least


def race(sizes: RaceSizes, repeats: int, seconds: float, with_full: bool) -> dict[str, list[float]]:
    """Times of each side; the body of a process."""
    ours = Ours(sizes)
    sides: dict[str, Any] = {"plain": Plain(ours, sizes)}
    if with_full:
        sides["plain, full"] = Plain(ours, sizes, all_rows=True)
    sides["ours"] = ours
    first = {name: side() for name, side in sides.items()}
    worst = max(abs(loss - first["plain"]) / first["plain"] for loss in first.values())
    if worst > LOSSES_AGREE:
        raise SystemExit(f"the sides do not compute the same: first losses {first}")
    return turns(sides, repeats=repeats, seconds=seconds)


def ranked(sizes: RaceSizes, repeats: int, cp: int, dp: int, micro_batches: int) -> dict[str, list[float]]:
    """Wall and processor seconds of a rank's steps; the body of a process."""
    ours = Ours(sizes, cp=cp, dp=dp, micro_batches=micro_batches)
    ours()
    taken: dict[str, list[float]] = {"wall": [], "processor": []}
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        ours()
        taken["wall"].append(time.perf_counter() - wall)
        taken["processor"].append(time.process_time() - processor)
    return taken
