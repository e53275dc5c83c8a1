"""What the processes of the race do: steps of its sides by turns, and steps of one rank of a layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sides import Ours, Plain, RaceSizes

LOSSES_AGREE = 1e-6  # relative; float32 sums in other orders, 1e-7 was seen


def turns(sides: dict[str, Callable[[], Any]], *, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Least processor time of a step of each side in each repeat; a side steps once before, to warm up.

    Sides step one after the other, so that a machine that is faster for a while is so for all of them.

    Args:
        sides: name to step.
        repeats: how often the least is taken anew.
        seconds: processor time of each side in a repeat; it has at least one step.
    """
    least: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(repeats):
        best, end = dict.fromkeys(sides, float("inf")), time.process_time() + seconds * len(sides)
        while float("inf") in best.values() or time.process_time() < end:
            for name, side in sides.items():
                started = time.process_time()
                side()
                best[name] = min(best[name], time.process_time() - started)
        for name in sides:
            least[name].append(best[name])
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
