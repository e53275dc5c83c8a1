"""Shapes of the run's own packs, smaller: which documents, where their images, how many tiles, which strides, labels.

    packs of the run's first steps --PackReader, no pixels--> layouts, labels, weights --scaled--> PackShape

A tile of T tokens becomes one of T', text runs shrink in proportion and never vanish, strides keep their share of a
text step. Every document, image and supervised run stays, as long as the token budget allows; what does not is counted.
Token ids and pixels are drawn from the pack's number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch, tile_shape
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.loader import plan_mixture
from megatron_v2pe.data.pack_reader import PackReader, TileShare, pack_request
from megatron_v2pe.data.plan.epoch_plan import PlannedPack
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.v2pe.layout import SampleLayout, pack_layout

SCALES = ((8, 1), (4, 1), (4, 2), (4, 4), (4, 8), (4, 16))
"""(patches on a tile's side, divisor of an image's tiles), tried in turn until the packs fit; sides in units of 2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentShape:
    """One document: its layout, and of each token whether it has a label, and with which weight.

    Attributes:
        layout: lengths, images, strides.
        weights: float32 [t], loss weight of each token's target; 0 where it has none.
    """

    layout: SampleLayout
    weights: NDArray[np.float32]


PackShape = tuple[DocumentShape, ...]


@dataclass(frozen=True, kw_only=True)
class ProofData:
    """Shapes of the packs of the proof, and where they come from.

    Attributes:
        packs: shapes.
        tile_side: patches on the side of a narrow tile.
        fingerprint: of the run's plan.
        digest: sha256 of the shapes.
        notes: what was made smaller.
    """

    packs: tuple[PackShape, ...]
    tile_side: int
    fingerprint: str
    digest: str
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """Numbers of documents, images and tokens."""
        documents = [document.layout for pack in self.packs for document in pack]
        images = sum(layout.num_images for layout in documents)
        tiles = sum(layout.total_tiles for layout in documents)
        tokens = sum(layout.num_tokens for layout in documents)
        strides = sorted({stride for layout in documents for stride in layout.strides.tolist()})
        return (
            f"{len(self.packs)} packs, {len(documents)} documents, {images} images of {tiles} tiles, {tokens} tokens, "
            f"strides {', '.join(map(str, strides)) or 'none'} of {documents[0].tokens_per_tile}"
        )


def read_shapes(
    config: RunConfig, arch: InternVLArchitecture, hf_folder: Path, *, num_packs: int, max_tokens: int
) -> ProofData:
    """Shapes of the run's first packs. Lengths are measured first where the run has not done so.

    Args:
        config: the run.
        arch: of its checkpoint.
        hf_folder: with its tokenizer.
        num_packs: how many; a run with fewer repeats them.
        max_tokens: of a narrow pack.

    Raises:
        ConfigError, DataError: see `plan_mixture`; a sample that cannot be read.
    """
    settings = sample_settings(config, arch, hf_folder)
    indexes, plan = plan_mixture(config, settings, show_progress=True)
    reader = PackReader(
        entries=tuple(index.entry for index in indexes),
        settings=settings,
        pad_to_multiple=1,
        pack_multiple=1,
        pad_token_id=0,
        loss_reduction=config.data.loss_reduction,
        tile_share=TileShare(rank=0, num_ranks=1, holds_vision=False),
    )
    planned = itertools.islice(_planned(plan.packs_of_step, config.optim.steps), num_packs)
    found = [_read(reader, pack_request(pack, indexes)) for pack in planned]
    full = list(itertools.islice(itertools.cycle(found), num_packs))
    unit = round(1 / arch.downsample_ratio)
    for side, divisor in SCALES:
        tile_side = side // 2 * unit
        tokens_per_tile = (tile_side // unit) ** 2
        if tokens_per_tile > arch.tokens_per_tile:
            continue
        packs = [_scaled_pack(batch, tokens_per_tile, divisor) for batch in full]
        if max(_num_tokens(pack) for pack in packs) <= max_tokens:
            break
    kept = tuple(_fitting(pack, max_tokens) for pack in packs)
    if not any(document.weights.any() for pack in kept for document in pack):
        raise DataError(
            f"data.meta: no document of the first {num_packs} packs that fits --tokens {max_tokens} has a supervised "
            "token; raise --tokens"
        )
    notes = [f"tiles of {tokens_per_tile} tokens for {arch.tokens_per_tile}, text in proportion"]
    if divisor > 1:
        notes.append(f"an image has 1/{divisor} of its tiles, at least one")
    lost = sum(map(len, packs)) - sum(map(len, kept))
    if lost:
        notes.append(f"{lost} documents left out: packs of at most {max_tokens} tokens (--tokens)")
    if len(found) < num_packs:
        notes.append(f"the run has {len(found)} packs, which are repeated")
    return ProofData(
        packs=kept,
        tile_side=tile_side,
        fingerprint=plan.fingerprint,
        digest=_digest(kept),
        notes=tuple(notes),
    )


def _planned(packs_of_step: Callable[[int], list[PlannedPack]], steps: int) -> Iterator[PlannedPack]:
    for step in range(steps):
        yield from packs_of_step(step)


def _read(reader: PackReader, request: Any) -> PackedBatch:
    sent = reader[request]
    if isinstance(sent, Exception):
        raise sent
    if sent.batch.blank:
        raise DataError(dict(sent.batch.damaged)[min(sent.batch.blank)])
    return sent.batch


def _num_tokens(pack: PackShape) -> int:
    return sum(document.layout.num_tokens for document in pack)


def _scaled_pack(batch: PackedBatch, tokens_per_tile: int, divisor: int) -> PackShape:
    bounds = batch.layout.cu_seqlens.tolist()
    return tuple(
        scaled_document(
            layout, batch.loss_weights[start : start + layout.num_tokens], tokens_per_tile, divisor
        )
        for layout, start in zip(batch.layout.documents, bounds[:-1], strict=True)
    )


def scaled_document(
    layout: SampleLayout, weights: NDArray[np.float32], tokens_per_tile: int, divisor: int = 1
) -> DocumentShape:
    """A document with smaller tiles and text runs.

    Args:
        layout: true one.
        weights: float32 [t], loss weight of each token's target, 0 where it has none.
        tokens_per_tile: of the narrow tile.
        divisor: of the number of tiles of each image.

    Example:
        4,096 text tokens and a tile of 256 at stride 64, tiles of 16: 256 text tokens, a tile of 16 at stride 4.
    """
    share = tokens_per_tile / layout.tokens_per_tile
    starts, strides = layout.image_starts.tolist(), layout.strides.tolist()
    starts_out: list[int] = []
    tiles_out: list[int] = []
    kept: list[NDArray[np.float32]] = []
    at = length = 0
    for start, tiles in [*zip(starts, layout.num_tiles.tolist(), strict=True), (layout.num_tokens, 0)]:
        text = _thinned(weights[at:start], share / divisor)
        kept.append(text)
        length += len(text)
        if tiles:
            few = -(-tiles // divisor)
            starts_out.append(length)
            tiles_out.append(few)
            kept.append(np.zeros(few * tokens_per_tile, dtype=np.float32))
            length += few * tokens_per_tile
        at = start + tiles * layout.tokens_per_tile
    found = np.concatenate(kept)
    if weights.any() and not found.any():
        found[max(0, length - 2)] = weights.max()
    narrow = SampleLayout(
        num_tokens=length,
        image_starts=np.array(starts_out, dtype=np.int64),
        num_tiles=np.array(tiles_out, dtype=np.int64),
        strides=np.array([max(1, round(stride * share)) for stride in strides], dtype=np.int64),
        tokens_per_tile=tokens_per_tile,
    )
    return DocumentShape(layout=narrow, weights=found)


def _thinned(weights: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Every 1/share-th token of a text run, at least one of a run that is not empty."""
    count = int(np.ceil(len(weights) * share))
    return weights[np.arange(count) * len(weights) // max(1, count)]


def _fitting(pack: PackShape, max_tokens: int) -> PackShape:
    """Documents of a pack while they fit; the first is kept in any case, cut where it alone is too long."""
    kept: list[DocumentShape] = []
    total = 0
    for document in pack:
        if kept and total + document.layout.num_tokens > max_tokens:
            continue
        kept.append(document if document.layout.num_tokens <= max_tokens else _cut(document, max_tokens))
        total += kept[-1].layout.num_tokens
    return tuple(kept)


def _cut(document: DocumentShape, max_tokens: int) -> DocumentShape:
    """The first tokens of a document and the images that lie in them whole; its last token has a label, if any has."""
    layout = document.layout
    ends = layout.image_starts + layout.num_tiles * layout.tokens_per_tile
    whole = int(np.searchsorted(ends, max_tokens, side="right"))
    length = max_tokens
    if whole < layout.num_images:
        length = min(length, max(1, int(layout.image_starts[whole])))
    weights = document.weights[:length].copy()
    if document.weights.any() and not weights.any():
        weights[-1] = document.weights.max()
    images = slice(0, whole)
    narrow = SampleLayout(
        num_tokens=length,
        image_starts=layout.image_starts[images],
        num_tiles=layout.num_tiles[images],
        strides=layout.strides[images],
        tokens_per_tile=layout.tokens_per_tile,
    )
    return DocumentShape(layout=narrow, weights=weights)


def _digest(packs: Sequence[PackShape]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(to_arrays(packs).items()):
        digest.update(name.encode() + str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def to_arrays(packs: Sequence[PackShape]) -> dict[str, NDArray[Any]]:
    """Shapes as named arrays, for one .npz file; see `from_arrays`."""
    arrays: dict[str, NDArray[Any]] = {"documents": np.array([len(pack) for pack in packs], dtype=np.int64)}
    for number, document in enumerate(itertools.chain(*packs)):
        layout = document.layout
        arrays[f"{number}/sizes"] = np.array([layout.num_tokens, layout.tokens_per_tile], dtype=np.int64)
        arrays[f"{number}/images"] = np.stack([layout.image_starts, layout.num_tiles, layout.strides])
        arrays[f"{number}/weights"] = document.weights
    return arrays


def from_arrays(arrays: Any) -> tuple[PackShape, ...]:
    """The shapes that `to_arrays` made arrays of."""
    numbers = itertools.count()
    return tuple(
        tuple(_document(arrays, next(numbers)) for _ in range(count))
        for count in arrays["documents"].tolist()
    )


def _document(arrays: Any, number: int) -> DocumentShape:
    num_tokens, tokens_per_tile = arrays[f"{number}/sizes"].tolist()
    starts, tiles, strides = arrays[f"{number}/images"]
    layout = SampleLayout(
        num_tokens=num_tokens,
        image_starts=starts,
        num_tiles=tiles,
        strides=strides,
        tokens_per_tile=tokens_per_tile,
    )
    return DocumentShape(layout=layout, weights=arrays[f"{number}/weights"])


def filled_pack(
    shape: PackShape,
    number: int,
    arch: InternVLArchitecture,
    *,
    pad_to_multiple: int,
    tile_range_of: Callable[[int], tuple[int, int]],
) -> PackedBatch:
    """A micro batch of a shape; its contents depend on `number` and not on the layout, only its padding does.

    Args:
        shape: of the pack.
        number: of the pack.
        arch: of the narrow model.
        pad_to_multiple: of each document.
        tile_range_of: tiles of the pack -> range whose pixels this rank encodes.
    """
    layout = pack_layout([document.layout for document in shape], pad_to_multiple=pad_to_multiple)
    tokens = np.full(layout.num_tokens, arch.language.pad_token_id % arch.language.vocab_size)
    labels = np.full(layout.num_tokens, IGNORE_INDEX)
    weights = np.zeros(layout.num_tokens, dtype=np.float32)
    generator = np.random.default_rng(number)
    for document, start in zip(shape, layout.cu_seqlens[:-1].tolist(), strict=True):
        length = document.layout.num_tokens
        ids = generator.integers(0, arch.language.vocab_size, length + 1)
        tokens[start : start + length] = ids[:-1]
        labels[start : start + length] = np.where(document.weights > 0, ids[1:], IGNORE_INDEX)
        weights[start : start + length] = document.weights
    first, last = tile_range_of(layout.num_tiles)
    size = (layout.num_tiles, *tile_shape(arch.tile_sizes))
    return PackedBatch(
        tokens=tokens.astype(np.int64),
        labels=labels.astype(np.int64),
        loss_weights=weights,
        layout=layout,
        num_tiles=layout.num_tiles,
        tile_range=(first, last),
        tiles=generator.integers(0, 256, size, dtype=np.uint8)[first:last],
        sample_ids=tuple(f"document {index} of pack {number}" for index in range(len(shape))),
        tile_sizes=arch.tile_sizes if arch.pyramid else (),
    )
