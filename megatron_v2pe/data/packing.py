"""Which samples share a pack: best fit under a token and a tile budget, planned before anything is opened.

    samples in drawn order --windows of 4096--> largest first, each into the fullest pack that still takes it

No sample is lost, repeated or split. Packs that stay far from full at the end of a window are dissolved into the
next one, so that only the last window leaves gaps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from megatron_v2pe.v2pe.layout import Int64Array

WINDOW = 4096
_NEARLY_FULL = 0.995
_MAX_CARRIED = WINDOW // 4


class _OpenPacks:
    """Packs being filled, ordered by free tokens."""

    def __init__(self, max_tokens: int, max_tiles: int) -> None:
        self._max_tokens, self._max_tiles = max_tokens, max_tiles
        self.members: list[list[int]] = []
        self.free_tokens: list[int] = []
        self._free_tiles: list[int] = []
        self._order: list[tuple[int, int]] = []  # (free tokens, pack), ascending

    def put(self, sample: int, tokens: int, tiles: int) -> None:
        """Put a sample into the fullest pack that takes it, or into a new one."""
        place = bisect_left(self._order, (tokens, -1))
        while place < len(self._order) and self._free_tiles[self._order[place][1]] < tiles:
            place += 1
        if place < len(self._order):
            pack = self._order.pop(place)[1]
        else:
            pack = len(self.members)
            self.members.append([])
            self.free_tokens.append(self._max_tokens)
            self._free_tiles.append(self._max_tiles)
        self.members[pack].append(sample)
        self.free_tokens[pack] -= tokens
        self._free_tiles[pack] -= tiles
        insort(self._order, (self.free_tokens[pack], pack))


def best_fit_packs(
    num_tokens: Int64Array, num_tiles: Int64Array, *, max_tokens: int, max_tiles: int, window: int = WINDOW
) -> list[list[int]]:
    """Distribute samples over packs.

    Args:
        num_tokens: int64 [n], tokens of each sample, none above `max_tokens`.
        num_tiles: int64 [n], tiles of each sample, none above `max_tiles`.
        max_tokens: token budget of a pack.
        max_tiles: tile budget of a pack.
        window: samples that are looked at together.

    Returns:
        indices of the samples of each pack, in rising order within a pack.

    Raises:
        ValueError: a sample exceeds a budget.
    """
    if len(num_tokens) and (int(num_tokens.max()) > max_tokens or int(num_tiles.max()) > max_tiles):
        raise ValueError(f"a sample exceeds the budget of {max_tokens} tokens and {max_tiles} tiles")
    packs: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(num_tokens), window):
        stop = min(start + window, len(num_tokens))
        pool = np.array([*carried, *range(start, stop)], dtype=np.int64)
        filled = _fill(pool, num_tokens, num_tiles, max_tokens=max_tokens, max_tiles=max_tiles)
        done, carried = _split_off(filled, max_tokens) if stop < len(num_tokens) else (filled.members, [])
        packs += done
    return [sorted(pack) for pack in packs]


def _fill(
    pool: Int64Array, num_tokens: Int64Array, num_tiles: Int64Array, *, max_tokens: int, max_tiles: int
) -> _OpenPacks:
    """Best fit, largest share of either budget first."""
    share = np.maximum(num_tokens[pool] / max_tokens, num_tiles[pool] / max_tiles)
    packs = _OpenPacks(max_tokens, max_tiles)
    for sample in pool[np.argsort(-share, kind="stable")].tolist():
        packs.put(sample, int(num_tokens[sample]), int(num_tiles[sample]))
    return packs


def _split_off(packs: _OpenPacks, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Finished packs, and the samples of the emptiest others, which the next window takes up again."""
    emptiest = sorted(range(len(packs.members)), key=lambda pack: -packs.free_tokens[pack])
    dissolved: set[int] = set()
    carried: list[int] = []
    for pack in emptiest:
        is_full = packs.free_tokens[pack] <= (1 - _NEARLY_FULL) * max_tokens
        if is_full or len(carried) + len(packs.members[pack]) > _MAX_CARRIED:
            break
        dissolved.add(pack)
        carried += packs.members[pack]
    done = [members for pack, members in enumerate(packs.members) if pack not in dissolved]
    return done, sorted(carried)


def pack_fill(packs: Sequence[Sequence[int]], num_tokens: Int64Array, *, max_tokens: int) -> float:
    """Share of the token budget of all packs that is used."""
    used = sum(int(num_tokens[list(pack)].sum()) for pack in packs)
    return used / (max_tokens * len(packs)) if packs else 0.0
