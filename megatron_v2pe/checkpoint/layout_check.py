"""Do the shards that all ranks of a layout save make up the model, each element once?

    rank 0..N-1 --sharded_state_dict (meta device)--> shards (key, bounds) --Tiling.problems--> gaps, overlaps, names

A shard is what mcore would write or read: its state key, its place in the whole tensor, and whether this rank is the
one of all copies that writes it. Names and shapes are compared with the table of Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_v2pe.checkpoint.hf.name_map import Entry, NameMap
from megatron_v2pe.checkpoint.state.model_state import model_sharded_state_dict
from megatron_v2pe.checkpoint.state.private_api import expand_factories, is_written_here, shards_in
from megatron_v2pe.parallel.topology import Ranks

Bounds = tuple[tuple[int, int], ...]
"""Half-open range along each dimension of the whole tensor."""


@dataclass(frozen=True)
class RankShard:
    """What one rank has of one tensor.

    Attributes:
        key: state key.
        whole_shape: of the tensor that all shards make up.
        bounds: of the shard in it.
        dtype: of the shard.
        is_written: this rank writes the shard; other ranks have copies.
        may_be_padded: the whole may be larger than the checkpoint's tensor (vocabulary, heads of a split tower).
    """

    key: str
    whole_shape: tuple[int, ...]
    bounds: Bounds
    dtype: torch.dtype
    is_written: bool
    may_be_padded: bool


def rank_shards(model_chunks: Sequence[torch.nn.Module], ranks: Ranks) -> list[RankShard]:
    """Shards of this rank's model chunks, as a save or a load would have them."""
    state, _ = expand_factories(model_sharded_state_dict(model_chunks, ranks))
    return [_rank_shard(shard) for shard in shards_in(state)]


def _rank_shard(shard: ShardedTensor) -> RankShard:
    added = len(shard.global_shape) - len(shard.local_shape)
    sizes = (1,) * added + tuple(shard.local_shape)
    return RankShard(
        key=shard.key,
        whole_shape=tuple(shard.global_shape),
        bounds=tuple((start, start + size) for start, size in zip(shard.global_offset, sizes, strict=True)),
        dtype=shard.dtype,
        is_written=is_written_here(shard),
        may_be_padded=shard.allow_shape_mismatch,
    )


class Tiling:
    """Shards of all ranks, collected rank by rank.

    Attributes:
        num_ranks: ranks that were added.
    """

    def __init__(self) -> None:
        self.num_ranks = 0
        self._written: dict[str, list[Bounds]] = {}
        self._copies: dict[str, set[Bounds]] = {}
        self._first: dict[str, RankShard] = {}
        self._unlike: list[str] = []

    def add(self, shards: Iterable[RankShard]) -> None:
        """Add what one rank has."""
        self.num_ranks += 1
        for shard in shards:
            first = self._first.setdefault(shard.key, shard)
            if (first.whole_shape, first.dtype) != (shard.whole_shape, shard.dtype):
                self._unlike.append(f"{shard.key}: ranks disagree on its whole shape or dtype")
            if shard.is_written:
                self._written.setdefault(shard.key, []).append(shard.bounds)
            else:
                self._copies.setdefault(shard.key, set()).add(shard.bounds)

    @property
    def num_tensors(self) -> int:
        """Tensors of the model."""
        return len(self._first)

    @property
    def num_shards(self) -> int:
        """Shards that are written, without copies."""
        return sum(map(len, self._written.values()))

    def problems(self, names: NameMap) -> list[str]:
        """Everything that is wrong with the collected shards, one sentence each.

        Args:
            names: table of the architecture.
        """
        found = sorted(set(self._unlike))
        found += [f"{key}: no rank holds it" for key in sorted(set(names.by_ours) - set(self._first))]
        found += [
            f"{key}: not in the table of names" for key in sorted(set(self._first) - set(names.by_ours))
        ]
        for key, first in self._first.items():
            if key in names.by_ours:
                found += _shape_problems(first, names.by_ours[key])
            written = self._written.get(key, [])
            found += _tiling_problems(key, written, first.whole_shape)
            lost = self._copies.get(key, set()) - set(written)
            found += [f"{key}: {bounds} has copies, but no rank writes it" for bounds in sorted(lost)]
        return found


def _shape_problems(shard: RankShard, entry: Entry) -> Iterator[str]:
    meta = [torch.empty(shape, device="meta") for shape in entry.hf_shapes]
    wanted, found = tuple(entry.transform.to_ours(meta).shape), shard.whole_shape
    unequal = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    is_padding = shard.may_be_padded and len(unequal) == 1 and found[unequal[0]] > wanted[unequal[0]]
    if len(found) != len(wanted) or (unequal and not is_padding):
        yield f"{shard.key}: is {found} on the ranks, {wanted} in the table"


def _tiling_problems(key: str, written: list[Bounds], whole: tuple[int, ...]) -> Iterator[str]:
    """Disjoint bounds inside the whole, of its volume together, cover it."""
    outside = [
        bounds
        for bounds in written
        if any(not 0 <= start < stop <= n for (start, stop), n in zip(bounds, whole, strict=True))
    ]
    yield from (f"{key}: {bounds} lies outside {whole}" for bounds in outside)
    yield from (
        f"{key}: {one} and {other} overlap" for one, other in combinations(written, 2) if _overlap(one, other)
    )
    covered = sum(prod(stop - start for start, stop in bounds) for bounds in written)
    if covered != prod(whole):
        yield f"{key}: {covered} elements are written, the tensor has {prod(whole)}"


def _overlap(one: Bounds, other: Bounds) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
