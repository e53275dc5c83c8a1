"""Steps whose ranks finish together: packs of about equal cost share a step, and ranks get equal shares of it.

    packs of an epoch --sort by cost, cut into groups of a step, shuffle the groups--> order of the packs
    packs of a step   --largest first, to the rank with least so far--> packs of each rank

The slowest rank decides a step's time. With one pack per rank only packs of equal cost help, so what a step holds is
chosen by cost, with 1 % of noise, and which step comes when is random. That does not depend on the number of ranks;
only the assignment to ranks does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_v2pe.config.batch_schedule import BatchSchedule
from megatron_v2pe.v2pe.layout import Int64Array

_NOISE = 0.01  # so that tiny differences, such as the file of origin, do not decide what shares a step


def whole_steps(batches: BatchSchedule, first: int, count: int) -> tuple[int, Int64Array]:
    """The steps that a run of packs consists of.

    Args:
        batches: sizes of the steps.
        first: packs of all steps before the first of these packs.
        count: how many packs there are.

    Returns:
        how many of them fill up a step that began before, and int64 [k], sizes of the steps that lie within.
    """
    ends = [level.from_pack for level in batches.levels[1:]] + [first + count + 1]
    starts: list[Int64Array] = []
    for level, end in zip(batches.levels, ends, strict=True):
        skipped = max(0, -((level.from_pack - first) // level.size))  # steps that begin before `first`
        low = level.from_pack + skipped * level.size
        starts.append(np.arange(low, min(end, first + count + 1), level.size, dtype=np.int64))
    bounds = np.concatenate(starts)
    return (int(bounds[0]) - first if len(bounds) else count), np.diff(bounds)


def order_for_steps(
    costs: Any, *, head: int, sizes: Int64Array, generator: np.random.Generator
) -> Int64Array:
    """Order of an epoch's packs in which every step's packs cost about the same.

    Packs that share a step with another epoch's (at both ends, where the epoch is no multiple of a step) are taken from
    the middle of all costs.

    Args:
        costs: float [n], cost of each pack.
        head: packs at the beginning that fill up a step of the epoch before.
        sizes: int64 [k], packs of the whole steps after them.
        generator: of the epoch.

    Returns:
        int64 [n], a permutation.
    """
    count, num_grouped = len(costs), int(sizes.sum())
    num_loose = count - num_grouped
    ranking = np.argsort(np.asarray(costs) * (1 + _NOISE * generator.random(count)), kind="stable")
    low = num_grouped // 2
    loose = generator.permutation(ranking[low : low + num_loose])
    ranking = np.delete(ranking, slice(low, low + num_loose))
    run_of_step = generator.permutation(len(sizes))  # runs of neighbours in the ranking, from the cheapest
    runs = sizes[np.argsort(run_of_step)]
    run_starts = (np.cumsum(runs) - runs)[run_of_step]
    step_starts = np.cumsum(sizes) - sizes
    grouped = np.empty(num_grouped, dtype=np.int64)
    for size in np.unique(sizes).tolist():
        of_size, within = np.flatnonzero(sizes == size), np.arange(size)
        packs = ranking[run_starts[of_size, None] + within]
        grouped[step_starts[of_size, None] + within] = generator.permuted(packs, axis=1)
    return np.concatenate([loose[:head], grouped, loose[head:]]).astype(np.int64)


def assign_packs(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Equally many packs to each rank, of about equal cost.

    Args:
        costs: of the packs of a step.
        num_ranks: must divide their number.

    Returns:
        for each rank, the places of its packs in rising order.
    """
    each = len(costs) // num_ranks
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    lightest = [(0.0, rank) for rank in range(num_ranks)]  # of the ranks that want more, a heap
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        cost, rank = heapq.heappop(lightest)
        assigned[rank].append(place)
        if len(assigned[rank]) < each:
            heapq.heappush(lightest, (cost + costs[place], rank))
    return [sorted(places) for places in assigned]


def imbalance(costs: Any, assigned: Sequence[Sequence[int]]) -> float:
    """Cost of the slowest rank of a step over the mean of all."""
    sums = [float(sum(costs[place] for place in places)) for places in assigned]
    return max(sums) / (sum(sums) / len(sums))
