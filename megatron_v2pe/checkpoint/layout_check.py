"""Do the pieces that all ranks of a layout save make up the model, each element once?

    rank 0..N-1 --sharded_state_dict (meta device)--> pieces (key, box) --Tiling.problems--> gaps, overlaps, names

A piece is what mcore would write or read: its state key, its place in the whole tensor, and whether this rank is the
one of all copies that writes it. Names and shapes are held against the table of Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from megatron_v2pe.checkpoint.hf.map import Entry, NameMap
from megatron_v2pe.checkpoint.state.dist_io import model_sharded_state_dict
from megatron_v2pe.parallel.topology import Ranks

Box = tuple[tuple[int, int], ...]
"""Half-open range along each dimension of the whole tensor."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one tensor.

    Attributes:
        key: state key.
        whole_shape: of the tensor that all pieces make up.
        box: where the piece lies in it.
        dtype: of the piece.
        is_written: this rank writes the piece; other ranks have copies.
        may_be_padded: the whole may be larger than the checkpoint's tensor (vocabulary, heads of a split tower).
    """

    key: str
    whole_shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    is_written: bool
    may_be_padded: bool


def rank_pieces(chunks: Sequence[torch.nn.Module], ranks: Ranks) -> list[Piece]:
    """Pieces of this rank's chunks, as a save or a load would take them."""
    state, _, _ = load_preprocess(model_sharded_state_dict(chunks, ranks))  # builds gate and up
    return [_piece(shard) for shard in nested_values(state) if isinstance(shard, ShardedTensor)]


def _piece(shard: ShardedTensor) -> Piece:
    added = len(shard.global_shape) - len(shard.local_shape)
    sizes = (1,) * added + tuple(shard.local_shape)
    ends = zip(shard.global_offset, sizes, strict=True)
    return Piece(
        key=shard.key,
        whole_shape=tuple(shard.global_shape),
        box=tuple((start, start + size) for start, size in ends),
        dtype=shard.dtype,
        is_written=is_main_replica(shard.replica_id),
        may_be_padded=shard.allow_shape_mismatch,
    )


class Tiling:
    """Pieces of all ranks, collected rank by rank.

    Attributes:
        num_ranks: ranks that were added.
    """

    def __init__(self) -> None:
        self.num_ranks = 0
        self._written: dict[str, list[Box]] = {}
        self._copies: dict[str, set[Box]] = {}
        self._like: dict[str, Piece] = {}
        self._unlike: list[str] = []

    def add(self, pieces: Iterable[Piece]) -> None:
        """Take in what one rank holds."""
        self.num_ranks += 1
        for piece in pieces:
            like = self._like.setdefault(piece.key, piece)
            if (like.whole_shape, like.dtype) != (piece.whole_shape, piece.dtype):
                self._unlike.append(f"{piece.key}: ranks disagree on its whole shape or dtype")
            where = self._written if piece.is_written else None
            if where is not None:
                where.setdefault(piece.key, []).append(piece.box)
            else:
                self._copies.setdefault(piece.key, set()).add(piece.box)

    @property
    def num_tensors(self) -> int:
        """Tensors of the model."""
        return len(self._like)

    @property
    def num_pieces(self) -> int:
        """Pieces that are written, without copies."""
        return sum(map(len, self._written.values()))

    def problems(self, names: NameMap) -> list[str]:
        """Everything that is wrong with the collected pieces, one sentence each.

        Args:
            names: table of the architecture.
        """
        found = sorted(set(self._unlike))
        found += [f"{key}: no rank holds it" for key in sorted(set(names.by_ours) - set(self._like))]
        found += [f"{key}: not in the table of names" for key in sorted(set(self._like) - set(names.by_ours))]
        for key, like in self._like.items():
            if key in names.by_ours:
                found += _shape_problems(like, names.by_ours[key])
            boxes = self._written.get(key, [])
            found += _tiling_problems(key, boxes, like.whole_shape)
            lost = self._copies.get(key, set()) - set(boxes)
            found += [f"{key}: {box} has copies, but nobody writes it" for box in sorted(lost)]
        return found


def _shape_problems(piece: Piece, entry: Entry) -> Iterator[str]:
    meta = [torch.empty(shape, device="meta") for shape in entry.hf_shapes]
    wanted, found = tuple(entry.transform.to_ours(meta).shape), piece.whole_shape
    unequal = [i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b]
    is_padding = piece.may_be_padded and len(unequal) == 1 and found[unequal[0]] > wanted[unequal[0]]
    if len(found) != len(wanted) or (unequal and not is_padding):
        yield f"{piece.key}: is {found} on the ranks, {wanted} in the table"


def _tiling_problems(key: str, boxes: list[Box], whole: tuple[int, ...]) -> Iterator[str]:
    """Disjoint boxes inside the whole, of its volume together, cover it."""
    outside = [box for box in boxes if any(not 0 <= a < b <= n for (a, b), n in zip(box, whole, strict=True))]
    yield from (f"{key}: {box} lies outside {whole}" for box in outside)
    yield from (
        f"{key}: {one} and {other} overlap" for one, other in combinations(boxes, 2) if _overlap(one, other)
    )
    covered, volume = sum(prod(b - a for a, b in box) for box in boxes), prod(whole)
    if covered != volume:
        yield f"{key}: {covered} elements are written, the tensor has {volume}"


def _overlap(one: Box, other: Box) -> bool:
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
