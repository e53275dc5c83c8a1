"""Which samples share a pack: as full as possible and as alike as possible, planned before anything is opened.

    samples in drawn order --windows of 8192--> spread: largest first, each into the emptiest of as many packs as the
    window can fill (attention costs length squared: long samples apart make packs of equal cost)
    --last 15 %--> best fit: each into the fullest pack that has room for it (this closes the gaps)

No sample is lost, repeated or split. What fits nowhere, and packs that stay far from full, go to the next window, so
that only the last window leaves gaps. Packs of samples longer than half a pack cannot be alike; `balance` puts those
of equal cost into one step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.data.plan.release_packing import GreedySample, ReleaseGreedyPacker
from megatron_v2pe.v2pe.layout import Int64Array

WINDOW = 8192
RELEASE_BUFFER = 20  # max_buffer_size in all of the release's recipes
_NEARLY_FULL = 0.997
_SPREAD = 0.85
_MAX_CARRIED = WINDOW // 4


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a pack may hold."""

    max_tokens: int
    max_tiles: int


class _OpenPacks:
    """Packs being filled; `order` keeps them by free tokens once best fit begins."""

    def __init__(self, count: int, budget: Budget) -> None:
        self._budget = budget
        self.members: list[list[int]] = []
        self.free_tokens: list[int] = []
        self._free_tiles: list[int] = []
        self._order: list[tuple[int, int]] = []  # (free tokens, pack), ascending
        for _ in range(count):
            self._open()

    def _open(self) -> int:
        self.members.append([])
        self.free_tokens.append(self._budget.max_tokens)
        self._free_tiles.append(self._budget.max_tiles)
        return len(self.members) - 1

    def _add(self, pack: int, sample: int, tokens: int, tiles: int) -> None:
        self.members[pack].append(sample)
        self.free_tokens[pack] -= tokens
        self._free_tiles[pack] -= tiles

    def spread(self, samples: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Put samples (number, tokens, tiles) into the emptiest pack each; those that do not fit are returned."""
        emptiest = [(-free, pack) for pack, free in enumerate(self.free_tokens)]
        heapq.heapify(emptiest)
        left: list[tuple[int, int, int]] = []
        for sample, tokens, tiles in samples:
            pack = emptiest[0][1] if emptiest else -1
            if pack < 0 or self.free_tokens[pack] < tokens or self._free_tiles[pack] < tiles:
                left.append((sample, tokens, tiles))
                continue
            self._add(pack, sample, tokens, tiles)
            heapq.heapreplace(emptiest, (-self.free_tokens[pack], pack))
        return left

    def start_best_fit(self) -> None:
        """Order the packs for `put`."""
        self._order = sorted((free, pack) for pack, free in enumerate(self.free_tokens))

    def put(self, sample: int, tokens: int, tiles: int, *, may_open: bool) -> bool:
        """Put a sample into the fullest pack that has room, perhaps into a new one; whether there was one."""
        place = bisect_left(self._order, (tokens, -1))
        while place < len(self._order) and self._free_tiles[self._order[place][1]] < tiles:
            place += 1
        if place < len(self._order):
            pack = self._order.pop(place)[1]
        elif may_open:
            pack = self._open()
        else:
            return False
        self._add(pack, sample, tokens, tiles)
        insort(self._order, (self.free_tokens[pack], pack))
        return True


def best_fit_packs(
    num_tokens: Int64Array, num_tiles: Int64Array, *, max_tokens: int, max_tiles: int, window: int = WINDOW
) -> list[list[int]]:
    """Distribute samples over packs.

    Args:
        num_tokens: int64 [n], tokens of each sample, none above `max_tokens`.
        num_tiles: int64 [n], tiles of each sample, none above `max_tiles`.
        max_tokens: token budget of a pack.
        max_tiles: tile budget of a pack.
        window: samples that are distributed together.

    Returns:
        indices of the samples of each pack, in rising order within a pack.

    Raises:
        ValueError: a sample exceeds a budget.
    """
    budget = Budget(max_tokens=max_tokens, max_tiles=max_tiles)
    _check_budget(num_tokens, num_tiles, budget)
    packs: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(num_tokens), window):
        stop = min(start + window, len(num_tokens))
        pool = np.array([*carried, *range(start, stop)], dtype=np.int64)
        is_last = stop == len(num_tokens)
        filled, left = _fill(pool, num_tokens[pool], num_tiles[pool], budget=budget, may_open=is_last)
        done, carried = (filled.members, []) if is_last else _split_off(filled, left, budget)
        packs += done
    return [sorted(pack) for pack in packs if pack]


def _check_budget(num_tokens: Int64Array, num_tiles: Int64Array, budget: Budget) -> None:
    if len(num_tokens) and (
        int(num_tokens.max()) > budget.max_tokens or int(num_tiles.max()) > budget.max_tiles
    ):
        raise ValueError(
            f"a sample exceeds the budget of {budget.max_tokens} tokens and {budget.max_tiles} tiles"
        )


def _fill(
    pool: Int64Array, tokens: Int64Array, tiles: Int64Array, *, budget: Budget, may_open: bool
) -> tuple[_OpenPacks, list[int]]:
    """Pack the samples of a window, largest share of either budget first; also those that fit nowhere."""
    share = np.maximum(tokens / budget.max_tokens, tiles / budget.max_tiles)
    order = np.argsort(-share, kind="stable")
    sums = (int(tokens.sum()) // budget.max_tokens, int(tiles.sum()) // budget.max_tiles)
    num_large = int((share > 0.5).sum())
    packs = _OpenPacks(max(*sums, num_large), budget)
    # Samples above half a pack are spread in any case: each needs a pack of its own.
    num_spread = max(num_large, int(np.searchsorted(np.cumsum(share[order]), _SPREAD * max(sums))))
    samples = list(zip(pool[order].tolist(), tokens[order].tolist(), tiles[order].tolist(), strict=True))
    rest = packs.spread(samples[:num_spread])
    packs.start_best_fit()
    left = [
        sample
        for sample, size, count in [*rest, *samples[num_spread:]]
        if not packs.put(sample, size, count, may_open=may_open)
    ]
    return packs, left


def _split_off(packs: _OpenPacks, left: list[int], budget: Budget) -> tuple[list[list[int]], list[int]]:
    """Finished packs, and what the next window distributes again: leftovers and the samples of the emptiest packs."""
    emptiest = sorted(range(len(packs.members)), key=lambda pack: -packs.free_tokens[pack])
    dissolved: set[int] = set()
    carried = list(left)
    for pack in emptiest:
        is_full = packs.free_tokens[pack] <= (1 - _NEARLY_FULL) * budget.max_tokens
        if is_full or len(carried) + len(packs.members[pack]) > _MAX_CARRIED:
            break
        dissolved.add(pack)
        carried += packs.members[pack]
    done = [members for pack, members in enumerate(packs.members) if pack not in dissolved]
    return done, sorted(carried)


def release_packs(
    num_tokens: Int64Array, num_tiles: Int64Array, *, max_tokens: int, max_tiles: int
) -> list[list[int]]:
    """The release's packer on the same samples: greedy, through a buffer of 20 packs. See `best_fit_packs`.

    A sample of text counts as one tile there.
    """
    _check_budget(num_tokens, num_tiles, Budget(max_tokens=max_tokens, max_tiles=max_tiles))
    packer = ReleaseGreedyPacker(max_tiles=max_tiles, max_tokens=max_tokens, max_buffer_size=RELEASE_BUFFER)
    packs: list[list[int]] = []
    for number, (tokens, tiles) in enumerate(zip(num_tokens.tolist(), num_tiles.tolist(), strict=True)):
        sample = GreedySample(sample_id=number, num_tokens=tokens, num_tiles=max(tiles, 1))
        packs += [[each.sample.sample_id for each in pack.members] for pack in packer.add(sample)]
    return packs + [[each.sample.sample_id for each in pack.members] for pack in packer.flush()]


def pack_fill(packs: Sequence[Sequence[int]], num_tokens: Int64Array, *, max_tokens: int) -> float:
    """Share of the token budget of all packs that is used."""
    used = sum(int(num_tokens[list(pack)].sum()) for pack in packs)
    return used / (max_tokens * len(packs)) if packs else 0.0
