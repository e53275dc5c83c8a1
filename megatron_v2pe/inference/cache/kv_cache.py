"""Keys and values of the tokens seen so far, in blocks of rows that documents may share.

    KVBlock   rows allocated at once: for each layer keys and values [k, capacity, d], head-major, rotated
    KVCache   one document: its first rows in blocks of others, which it never writes, and a block of its own at the end

    cache      [ block A, 5 rows ][ own block ]
    fork(3)    [ block A, 3 rows ]                 another question about the same three tokens; nothing is copied

On context parallel ranks each holds its zigzag share of every prefill chunk, and new token i where i % cp is its rank.
Rows lie in the order of tokens, so the first n tokens are the first rows (see `chunks.rows_before`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.inference.cache.memory import KVKind
from megatron_v2pe.inference.cache.quantize import dequantize, quantize, stored_dtype
from megatron_v2pe.inference.chunks import PrefillChunk, Span, rows_before, tokens_held
from megatron_v2pe.v2pe.layout import Int64Array

ROWS_AT_ONCE = 4096  # of an 8-bit cache, converted at a time


@dataclass(frozen=True, kw_only=True)
class KVPlace:
    """Where a cache lives.

    Attributes:
        cp: context parallel ranks.
        cp_rank: this one.
        group: their process group; None on one rank.
        kind: how rows are stored; `model` is the compute dtype.
    """

    cp: int = 1
    cp_rank: int = 0
    group: Any = None
    kind: KVKind = "model"


class KVBlock:
    """Rows of all layers of this rank, allocated when a layer is first written.

    Args:
        capacity: rows; extending past it is an error, not a reallocation.
        kind: how rows are stored.
    """

    def __init__(self, capacity: int, kind: KVKind = "model") -> None:
        self.capacity, self.kind = capacity, kind
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # [k, capacity, d] keys, values
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}  # [k, capacity, 1]
        self.rows: dict[int, int] = {}
        self.dtype = torch.float32  # of the model, that of what was written
        self._squares: Tensor | None = None  # float64 [2] on the device: of quantisation errors, of values

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Write [n, k, d] after what the layer has.

        Raises:
            IndexError: the block is too small, which is a mistake of the caller's plan.
        """
        start = self.rows.get(layer_number, 0)
        stop = start + len(key)
        if stop > self.capacity:
            raise IndexError(f"{stop} rows do not fit a block made for {self.capacity}")
        if layer_number not in self.layers:
            self._allocate(layer_number, key)
        for index, x in enumerate((key, value)):
            rows = x.transpose(0, 1)  # [n, k, d] -> [k, n, d]
            if self.kind != "model":
                rows, scale = quantize(rows, self.kind)
                self.scales[layer_number][index][:, start:stop] = scale
                self._measure(x, dequantize(rows, scale, torch.float32))
            self.layers[layer_number][index][:, start:stop] = rows
        self.rows[layer_number] = stop

    def _allocate(self, layer_number: int, like: Tensor) -> None:
        heads, dim = like.shape[1:]
        self.dtype = like.dtype
        stored = stored_dtype(self.kind, like.dtype)
        shape = (heads, self.capacity, dim)
        self.layers[layer_number] = (like.new_empty(shape, dtype=stored), like.new_empty(shape, dtype=stored))
        if self.kind != "model":
            narrow = (heads, self.capacity, 1)
            self.scales[layer_number] = tuple(like.new_empty(narrow, dtype=torch.bfloat16) for _ in range(2))  # type: ignore[assignment]

    def _measure(self, x: Tensor, kept: Tensor) -> None:
        wide = x.transpose(0, 1).double()
        found = torch.stack([(wide - kept).square().sum(), wide.square().sum()])
        self._squares = found if self._squares is None else self._squares + found

    def read(self, layer_number: int, rows: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows first..rows-1 of a layer, in the model's dtype, piece by piece."""
        keys, values = self.layers[layer_number]
        if self.kind == "model":
            yield keys[:, first:rows], values[:, first:rows]
            return
        for start in range(first, rows, ROWS_AT_ONCE):
            part = slice(start, min(rows, start + ROWS_AT_ONCE))
            pair = zip((keys, values), self.scales[layer_number], strict=True)
            found = [dequantize(stored[:, part], scale[:, part], self.dtype) for stored, scale in pair]
            yield found[0], found[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        tensors = [x for pair in (*self.layers.values(), *self.scales.values()) for x in pair]
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def squares(self) -> tuple[float, float]:
        """Sums of squares: of what eight bits changed, and of the values themselves."""
        return (0.0, 0.0) if self._squares is None else (float(self._squares[0]), float(self._squares[1]))


@dataclass
class _Share:
    """A block and how many of its rows belong to a document; None for the open block, whose rows grow."""

    block: KVBlock
    rows: int | None


class KVCache:
    """Keys and values of one document on this rank; a `KeyValueStore` of the attention.

    Args:
        place: this rank and how rows are stored.

    Attributes:
        spans: tokens in the cache, in the order in which they came.
    """

    def __init__(self, place: KVPlace) -> None:
        self.place = place
        self.spans: list[Span] = []
        self._shares: list[_Share] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of the document that ranks hold together."""
        return self.spans[-1].stop if self.spans else 0

    def rows_of(self, rank: int, tokens: int | None = None) -> int:
        """Rows that a rank holds of the first tokens, all of them by default."""
        end = self.num_tokens if tokens is None else tokens
        return rows_before(self.spans, end, cp=self.place.cp, rank=rank)

    def reserve(self, chunks: Sequence[PrefillChunk], new_tokens: int) -> None:
        """Open a block for chunks that come, and new tokens after them; what was open before is closed."""
        place = self.place
        spans = [Span(start=c.start, stop=c.stop, padded=c.padded) for c in chunks]
        end = spans[-1].stop if spans else self.num_tokens
        spans.append(Span(start=end, stop=end + new_tokens))
        rows = rows_before(spans, end + new_tokens, cp=place.cp, rank=place.cp_rank)
        self._close()
        self._shares.append(_Share(KVBlock(max(rows, 1), place.kind), None))

    def _close(self) -> None:
        if self._shares and self._shares[-1].rows is None:
            last = self._shares[-1]
            before = sum(share.rows or 0 for share in self._shares[:-1])
            last.rows = self.rows_of(self.place.cp_rank) - before

    def fork(self, tokens: int) -> KVCache:
        """A document that shares the first tokens of this one. Nothing is copied; `reserve` before it grows.

        This document may still grow: rows that it adds are not the fork's.
        """
        other = KVCache(self.place)
        for span in self.spans:
            if span.start < tokens:
                other.spans.append(Span(start=span.start, stop=min(span.stop, tokens), padded=span.padded))
        wanted = self.rows_of(self.place.cp_rank, tokens)
        held = self.rows_of(self.place.cp_rank)
        for share in self._shares:
            rows = held if share.rows is None else share.rows
            taken = min(rows, wanted)
            if taken:
                other._shares.append(_Share(share.block, taken))
            wanted, held = wanted - taken, held - rows
        return other

    def branch(self, shared: int, new_tokens: int) -> KVCache:
        """A document that shares the first tokens and has copies of the rest, with room for new ones."""
        place = self.place
        other = self.fork(shared)
        other.reserve([], self.num_tokens - shared + new_tokens)
        first = self.rows_of(place.cp_rank, shared)
        layers = {number for share in self._shares for number in share.block.rows}
        for number in layers:
            parts = [torch.stack(part) for part in self.parts(number)]
            keys, values = torch.cat(parts, dim=2)[:, :, first:].transpose(
                1, 2
            )  # [2, k, n, d] -> [2, n, k, d]
            other.append(number, keys, values)
        other.spans = list(self.spans)
        return other

    def note_chunk(self, chunk: PrefillChunk) -> CacheStep:
        """Enter a chunk and describe the forward pass that computes it."""
        place = self.place
        past = tuple(self.rows_of(rank) for rank in range(place.cp))
        span = Span(start=chunk.start, stop=chunk.stop, padded=chunk.padded)
        self.spans.append(span)
        kept = span.rows_before(chunk.stop, cp=place.cp, rank=place.cp_rank)
        return CacheStep(
            stores=(self,),
            is_chunk=True,
            kept=kept,
            past_rows=past,
            start=chunk.start,
            padded=chunk.padded,
            group=place.group,
        )

    def note_token(self) -> int:
        """Enter a new token; returns the rank that keeps it."""
        token = self.num_tokens
        last = self.spans[-1] if self.spans else None
        if last is not None and last.padded == 0:
            self.spans[-1] = Span(start=last.start, stop=token + 1)
        else:
            self.spans.append(Span(start=token, stop=token + 1))
        return token % self.place.cp

    def parts(self, layer_number: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `KeyValueStore`."""
        for share in self._shares:
            rows = share.block.rows.get(layer_number, 0) if share.rows is None else share.rows
            if rows > first:
                yield from share.block.read(layer_number, rows, first)
            first = max(0, first - rows)

    def tokens_held(self, rank: int, first: int, stop: int) -> Int64Array:
        """See `KeyValueStore`."""
        return tokens_held(self.spans, first, stop, cp=self.place.cp, rank=rank)

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """See `KeyValueStore`."""
        if len(key):
            self._shares[-1].block.append(layer_number, key, value)

    def stored_rows(self) -> dict[str, Tensor]:
        """All rows as they are stored: `keys.LAYER`, `values.LAYER` [k, n, d], with `_scales` in eight bits."""
        found: dict[str, list[Tensor]] = {}
        for block, rows in self.blocks:
            for number, pair in block.layers.items():
                for name, x in zip(("keys", "values"), pair, strict=True):
                    found.setdefault(f"{name}.{number}", []).append(x[:, :rows])
            for number, pair in block.scales.items():
                for name, x in zip(("keys", "values"), pair, strict=True):
                    found.setdefault(f"{name}_scales.{number}", []).append(x[:, :rows])
        return {name: torch.cat(parts, dim=1).contiguous() for name, parts in found.items()}

    def restore(self, spans: Sequence[Span], rows: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Fill an empty cache with what `stored_rows` gave.

        Args:
            spans: of the document.
            rows: tensors by name.
            dtype: of the model.
        """
        self.spans = list(spans)
        count = self.rows_of(self.place.cp_rank)
        block = KVBlock(max(count, 1), self.place.kind)
        block.dtype = dtype
        for number in sorted(int(name.split(".")[1]) for name in rows if name.startswith("keys.")):
            block.layers[number] = (rows[f"keys.{number}"], rows[f"values.{number}"])
            if self.place.kind != "model":
                block.scales[number] = (rows[f"keys_scales.{number}"], rows[f"values_scales.{number}"])
            block.rows[number] = count
        self._shares = [_Share(block, count)]

    @property
    def blocks(self) -> list[tuple[KVBlock, int]]:
        """Blocks and their rows that belong to the document."""
        held = self.rows_of(self.place.cp_rank)
        found = []
        for share in self._shares:
            rows = held if share.rows is None else share.rows
            found.append((share.block, rows))
            held -= rows
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks on this rank, shared ones included."""
        return sum(block.num_bytes for block, _ in self.blocks)

    @property
    def relative_error(self) -> float:
        """What eight bits changed: root of the sum of squared errors over that of the values; 0 for `model`."""
        squares = [block.squares for block, _ in self.blocks]
        total = sum(values for _, values in squares)
        return (sum(errors for errors, _ in squares) / total) ** 0.5 if total else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheStep:
    """See `batch.kv_cache.CacheStep`."""

    stores: Sequence[KVCache]
    is_chunk: bool
    kept: int = 0
    past_rows: Sequence[int] = ()
    owners: Sequence[int] = field(default=())
    start: int = 0
    padded: int = 0
    group: Any = None
    halo_plans: dict[int, Any] = field(default_factory=dict)


def token_step(caches: Sequence[KVCache]) -> CacheStep:
    """Enter one new token of each document and describe the forward pass that computes them."""
    owners = tuple(cache.note_token() for cache in caches)
    return CacheStep(stores=tuple(caches), is_chunk=False, owners=owners, group=caches[0].place.group)
