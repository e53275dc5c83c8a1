"""Which tokens of a pack each context parallel rank holds, when documents may lie whole on one rank: pure integers.

    zigzag         every document is cut over all ranks (see `zigzag`): equal shards, all keys travel
    by_document    short documents lie whole on one rank, long ones are cut over as many as balance needs, and keys of
                   a document travel between its own ranks only
    auto           by_document for packs where its busiest rank receives at most `AUTO_ROWS` of zigzag's keys

A document of n tokens costs n (n + L): its attention costs as much as its linears at n = L. Tiles cost the same
wherever their tokens are, because tower and projector run on even shares of them. The longest document comes first;
each goes to the least loaded ranks, to the fewest (a divisor of cp) that stay within the limits of cost and of tokens;
where none do, to as many as raise the fullest least. All arithmetic is whole numbers, so that all ranks find the same.

                                                  rank 0: 0 1 . . . . 6 7 | a b c d | . . .
    documents of 8, 4 and 4 tokens, cp 2          rank 1: . . 2 3 4 5 . . | . . . . | A B C D
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import linear_tokens
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.parallel.zigzag import shard_ranges_of_ranks
from megatron_v2pe.v2pe.layout import Int64Array

Mode = Literal["zigzag", "by_document", "auto"]
Holders = tuple[tuple[int, ...], ...]
"""For each document the ranks that hold it, ascending; the i-th of g has zigzag chunks i and 2g-1-i."""

COST_PERCENT = 102
"""Of the mean cost, what a rank may have."""
TOKENS_PERCENT = 107
"""Of the mean tokens, what a rank may have: memory of the fullest rank follows them."""
AUTO_ROWS = (3, 4)
"""`auto`: share, as a fraction, of the keys and values that zigzag would send."""


@dataclass(frozen=True, eq=False)
class Shards:
    """A pack, cut.

    Attributes:
        ranges: of each rank, int64 [R, 2], half-open token ranges of the pack in the order in which it holds them.
        lengths: tokens of each document, padded.
        holders: None where every document is cut over all ranks.
    """

    ranges: tuple[Int64Array, ...]
    lengths: tuple[int, ...]
    holders: Holders | None

    def tokens(self, rank: int) -> int:
        """Tokens of a rank."""
        ranges = self.ranges[rank]
        return int((ranges[:, 1] - ranges[:, 0]).sum())

    def local_lengths(self, rank: int) -> tuple[int, ...]:
        """Tokens of each document on a rank, 0 where it holds none of it."""
        if self.holders is None:
            return tuple(length // len(self.ranges) for length in self.lengths)
        return local_lengths(self.lengths, self.holders, rank)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How packs of a run are cut.

    Attributes:
        mode: `parallel.cp_sharding`.
        linear_tokens: L, length of a document whose attention costs as much as its linears.
    """

    mode: Mode = "zigzag"
    linear_tokens: int = 1

    def shards(self, cu_seqlens: Int64Array, *, cp: int) -> Shards:
        """Cut a pack over `cp` ranks.

        Args:
            cu_seqlens: int64 [N+1], boundaries of the padded documents; lengths are multiples of 2 cp.
            cp: ranks that share the pack.

        Raises:
            ValueError: a length that does not divide.
        """
        lengths = tuple(np.diff(cu_seqlens).tolist())
        holders = None
        if cp > 1 and self.mode != "zigzag":
            holders = assign_documents(lengths, cp=cp, linear_tokens=self.linear_tokens)
            if self.mode == "auto" and holders is not None and not saves_enough(lengths, holders, cp=cp):
                holders = None
        if holders is None:
            return Shards(tuple(shard_ranges_of_ranks(cu_seqlens, cp=cp)), lengths, None)
        return held_by(cu_seqlens, holders, cp=cp)


ZIGZAG = Sharding()


def held_by(cu_seqlens: Int64Array, holders: Holders, *, cp: int) -> Shards:
    """A pack whose documents lie on given ranks, ascending."""
    ranges = tuple(_ranges(cu_seqlens, holders, rank) for rank in range(cp))
    return Shards(ranges, tuple(np.diff(cu_seqlens).tolist()), holders)


def sharding_of(parallel: ParallelConfig, arch: InternVLArchitecture) -> Sharding:
    """How packs of a run are cut."""
    return Sharding(mode=parallel.cp_sharding, linear_tokens=linear_tokens(arch))


@lru_cache(maxsize=256)  # a step asks several times for each of its packs
def assign_documents(lengths: tuple[int, ...], *, cp: int, linear_tokens: int) -> Holders | None:
    """The ranks of each document; None where a rank would stay empty, or a document would not divide.

    Args:
        lengths: tokens of each document, padded to multiples of 2 cp.
        cp: ranks.
        linear_tokens: L of `Sharding`.

    Raises:
        ValueError: a length that does not divide.
    """
    wrong = next((n for n in lengths if n % (2 * cp)), None)
    if wrong is not None:
        raise ValueError(
            f"a document has {wrong} tokens, but context parallel size {cp} needs a multiple of {2 * cp}; pad "
            "documents to ParallelPlan.pad_to_multiple"
        )
    loads = _Loads(lengths, cp=cp, linear_tokens=linear_tokens)
    holders: list[tuple[int, ...]] = [()] * len(lengths)
    for document in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        holders[document] = loads.place(document)
    return tuple(holders) if min(loads.tokens) else None


class _Loads:
    """What ranks have so far, cp times too large, so that shares over a divisor of cp ranks are whole numbers."""

    def __init__(self, lengths: tuple[int, ...], *, cp: int, linear_tokens: int) -> None:
        self.lengths = lengths
        self.costs = [n * (n + linear_tokens) for n in lengths]
        self.total_cost, self.total_tokens = sum(self.costs), sum(lengths)  # the means, cp times too large
        self.cost, self.tokens = [0] * cp, [0] * cp
        self.counts = [count for count in range(1, cp + 1) if cp % count == 0]

    def place(self, document: int) -> tuple[int, ...]:
        """Choose ranks for a document and add it to them."""
        order = sorted(range(len(self.cost)), key=lambda rank: (self._fullness(rank, 0, 0), rank))
        found = [(self._worst(document, order[:count]), order[:count]) for count in self.counts]
        fits = [ranks for _, ranks in found if self._fits(document, ranks)]
        chosen = tuple(sorted(fits[0] if fits else min(found, key=lambda each: each[0])[1]))
        cost, tokens = self._share(document, chosen)
        for rank in chosen:
            self.cost[rank] += cost
            self.tokens[rank] += tokens
        return chosen

    def _share(self, document: int, ranks: Sequence[int]) -> tuple[int, int]:
        """Cost and tokens of a document on each of so many ranks."""
        share = len(self.cost) // len(ranks)
        return self.costs[document] * share, self.lengths[document] * share

    def _fullness(self, rank: int, cost: int, tokens: int) -> int:
        """The larger of cost and tokens over their means, with more of both; times a constant."""
        by_cost = (self.cost[rank] + cost) * self.total_tokens
        return max(by_cost, (self.tokens[rank] + tokens) * self.total_cost)

    def _worst(self, document: int, ranks: Sequence[int]) -> int:
        return max(self._fullness(rank, *self._share(document, ranks)) for rank in ranks)

    def _fits(self, document: int, ranks: Sequence[int]) -> bool:
        cost, tokens = self._share(document, ranks)
        return all(
            100 * (self.cost[rank] + cost) <= COST_PERCENT * self.total_cost
            and 100 * (self.tokens[rank] + tokens) <= TOKENS_PERCENT * self.total_tokens
            for rank in ranks
        )


def saves_enough(lengths: tuple[int, ...], holders: Holders, *, cp: int) -> bool:
    """Whether the busiest rank receives at most `AUTO_ROWS` of the keys that each would receive with zigzag."""
    most = max(rows_received(lengths, holders, rank) for rank in range(cp))
    part, whole = AUTO_ROWS
    return whole * most * cp <= part * (cp - 1) * sum(lengths)


def rows_received(lengths: tuple[int, ...], holders: Holders, rank: int) -> int:
    """Tokens whose keys and values a rank receives in a forward pass, `attention.transports.direct` sends no others."""
    rows = 0
    for length, ranks in zip(lengths, holders, strict=True):
        if rank in ranks:
            place, count = ranks.index(rank), len(ranks)
            rows += (
                length // (2 * count) * (place + 2 * (count - 1 - place))
            )  # half of each lower rank's keys
    return rows


def local_lengths(lengths: tuple[int, ...], holders: Holders, rank: int) -> tuple[int, ...]:
    """Tokens of each document on a rank, 0 where it holds none of it."""
    return tuple(
        length // len(ranks) if rank in ranks else 0 for length, ranks in zip(lengths, holders, strict=True)
    )


def _ranges(cu_seqlens: Int64Array, holders: Holders, rank: int) -> Int64Array:
    """Token ranges of a rank: a whole document is one, a cut one two."""
    found: list[tuple[int, int]] = []
    for start, stop, ranks in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), holders, strict=True):
        if rank not in ranks:
            continue
        if len(ranks) == 1:
            found.append((start, stop))
            continue
        place, size = ranks.index(rank), (stop - start) // (2 * len(ranks))
        late = 2 * len(ranks) - 1 - place
        found += [
            (start + place * size, start + (place + 1) * size),
            (start + late * size, start + (late + 1) * size),
        ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)
