"""One packed sample taken apart: runs of text and images with labels, positions and owners, as training sees them.

    plan --step, number--> requests --read--> documents --collate--> pack --view_pack--> runs --listing--> text

A run is text that is supervised or not, one image, or padding; its owners are the context parallel ranks that hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.fp8 import pack_multiple
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.loader import plan_mixture
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.medium import MediumTiles
from megatron_v2pe.data.pack_reader import PackReader, TileShare, pack_request
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.text.tokenizer import Tokenizer
from megatron_v2pe.parallel.shards import sharding_of
from megatron_v2pe.parallel.topology import resolve
from megatron_v2pe.parallel.zigzag import range_indices
from megatron_v2pe.v2pe.layout import Int64Array
from megatron_v2pe.v2pe.positions import position_units

Kind = Literal["text", "supervised", "image", "padding"]
_SHOWN_TEXT = 96


@dataclass(frozen=True, kw_only=True)
class TokenRun:
    """Consecutive tokens of one kind.

    Attributes:
        kind: what they are; `supervised` text is what the loss asks for.
        start: first token in the pack.
        end: index after the last token.
        first_position: of the first token, in whole steps (a multiple of 1/tokens_per_tile).
        last_position: of the last token.
        owners: context parallel ranks that hold tokens of the run, in the order of the tokens.
        text: decoded, empty for images and padding.
        image: number of the image in its document, -1 for none.
    """

    kind: Kind
    start: int
    end: int
    first_position: float
    last_position: float
    owners: tuple[int, ...]
    text: str = ""
    image: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentView:
    """One document of the pack.

    Attributes:
        sample_id: its identity.
        runs: everything in it, padding included.
        media: its images and videos.
        num_tiles: of each image.
        strides: of each image, in 1/tokens_per_tile.
        num_supervised: tokens that the loss asks for.
    """

    sample_id: str
    runs: tuple[TokenRun, ...]
    media: tuple[MediumTiles, ...]
    num_tiles: tuple[int, ...]
    strides: tuple[int, ...]
    num_supervised: int

    @property
    def images(self) -> list[tuple[str, ImageTiles]]:
        """File of each image, and how it is cut."""
        return [
            (each.medium.path if each.medium else "", image) for each in self.media for image in each.images
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackView:
    """A pack and how it is cut.

    Attributes:
        title: step and number.
        documents: in order.
        batch: the pack without pixels.
        positions: float64 [t].
        owners: int [t], context parallel rank of each token.
        cp: ranks.
        tokens_per_tile: visual tokens of a tile.
        image_size: tile size in pixels.
    """

    title: str
    documents: tuple[DocumentView, ...]
    batch: PackedBatch
    positions: np.ndarray
    owners: Int64Array
    cp: int
    tokens_per_tile: int
    image_size: int


def view_pack(
    config: RunConfig,
    arch: InternVLArchitecture,
    hf_folder: Path,
    *,
    step: int,
    micro_batch: int,
    cp: int,
) -> PackView:
    """Read one pack of a run as its loader would.

    Args:
        config: the run.
        arch: of its checkpoint.
        hf_folder: with the tokenizer.
        step: 1-based, as in metrics.jsonl.
        micro_batch: 0-based, among the packs of the step over all data parallel ranks.
        cp: context parallel ranks that share it.

    Raises:
        ConfigError: no such step or micro batch.
        DataError: the data cannot be used.
    """
    if not 1 <= step <= config.optim.steps:
        raise ConfigError(f"--step is {step}, but the run has steps 1 to optim.steps = {config.optim.steps}")
    num_packs = batch_schedule(config).size(step - 1)
    if not 0 <= micro_batch < num_packs:
        raise ConfigError(
            f"--micro-batch is {micro_batch}, but step {step} has packs 0 to {num_packs - 1} "
            "(optim.global_batch_size, over all data parallel ranks)"
        )
    batch, media, tokenizer = _read_pack(config, arch, hf_folder, place=(step - 1, micro_batch), cp=cp)
    owners = np.zeros(len(batch.tokens), dtype=np.int64)
    shards = sharding_of(config.parallel, arch).shards(batch.layout.cu_seqlens, cp=cp)
    for rank, ranges in enumerate(shards.ranges):
        owners[range_indices(ranges)] = rank
    positions = position_units(batch.layout) / arch.tokens_per_tile
    return PackView(
        title=f"step {step}, micro batch {micro_batch} of {num_packs}",
        documents=tuple(
            _view_document(batch, number, positions, owners, tokenizer, own)
            for number, own in enumerate(media)
        ),
        batch=batch,
        positions=positions,
        owners=owners,
        cp=cp,
        tokens_per_tile=arch.tokens_per_tile,
        image_size=arch.image_size,
    )


def _read_pack(
    config: RunConfig, arch: InternVLArchitecture, hf_folder: Path, *, place: tuple[int, int], cp: int
) -> tuple[PackedBatch, list[tuple[MediumTiles, ...]], Tokenizer]:
    """The pack at (0-based step, number) without pixels, the media of each document, and the tokenizer."""
    parallel = replace(config.parallel, cp=cp, pp=1, vpp=1, pipeline_layout="")
    layout = resolve(parallel, parallel.tp * cp)
    multiple = pack_multiple(replace(config, parallel=parallel))
    settings = sample_settings(config, arch, hf_folder)
    tokenizer = settings.text.tokenizer
    indexes, plan = plan_mixture(config, settings)
    reader = PackReader(
        entries=tuple(index.entry for index in indexes),
        settings=settings,
        pad_to_multiple=layout.pad_to_multiple,
        pack_multiple=multiple,
        pad_token_id=tokenizer.pad_id,
        loss_reduction=config.data.loss_reduction,
        tile_share=TileShare(rank=0, num_ranks=1, holds_vision=False),
    )
    requests = pack_request(plan.packs_of_step(place[0])[place[1]], indexes)
    samples = [reader.read_document(request) for request in requests]
    batch = collate_pack(
        samples,
        pad_to_multiple=layout.pad_to_multiple,
        pack_multiple=multiple,
        pad_token_id=tokenizer.pad_id,
        loss_reduction=config.data.loss_reduction,
        image_size=arch.image_size,
        tile_range_of=lambda _: (0, 0),  # pixels are opened for the pictures only
    )
    return batch, [sample.media for sample in samples], tokenizer


def _view_document(
    batch: PackedBatch,
    number: int,
    positions: np.ndarray,
    owners: Int64Array,
    tokenizer: Tokenizer,
    media: tuple[MediumTiles, ...],
) -> DocumentView:
    low, high = batch.layout.cu_seqlens[number : number + 2].tolist()
    layout = batch.layout.documents[number]
    is_target = np.zeros(high - low, dtype=bool)
    is_target[1:] = batch.labels[low : high - 1] != IGNORE_INDEX  # labels are the next token's
    code = is_target.astype(np.int64)
    code[layout.num_tokens :] = 2
    for image, (start, tiles) in enumerate(
        zip(layout.image_starts.tolist(), layout.num_tiles.tolist(), strict=True)
    ):
        code[start : start + tiles * layout.tokens_per_tile] = 3 + image
    runs = tuple(
        _token_run(batch, int(code[start]), low + start, low + end, positions, owners, tokenizer)
        for start, end in _constant_ranges(code)
    )
    return DocumentView(
        sample_id=batch.sample_ids[number],
        runs=runs,
        media=media,
        num_tiles=tuple(layout.num_tiles.tolist()),
        strides=tuple(layout.strides.tolist()),
        num_supervised=int(is_target.sum()),
    )


def _constant_ranges(values: Int64Array) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(values)) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)


def _token_run(
    batch: PackedBatch,
    code: int,
    start: int,
    end: int,
    positions: np.ndarray,
    owners: Int64Array,
    tokenizer: Tokenizer,
) -> TokenRun:
    kinds: tuple[Kind, ...] = ("text", "supervised", "padding", "image")
    kind = kinds[min(code, 3)]
    held = [int(owners[start + low]) for low, _ in _constant_ranges(owners[start:end])]
    return TokenRun(
        kind=kind,
        start=start,
        end=end,
        first_position=float(positions[start]),
        last_position=float(positions[end - 1]),
        owners=tuple(held),
        text=tokenizer.decode(batch.tokens[start:end].tolist()) if code < 2 else "",
        image=code - 3 if code >= 3 else -1,
    )


def listing(view: PackView) -> str:
    """The pack as text: one line per run."""
    batch = view.batch
    supervised = sum(document.num_supervised for document in view.documents)
    lines = [
        f"{view.title}: {len(batch.tokens):,} tokens with padding, {len(view.documents)} documents, "
        f"{batch.num_tiles} tiles, {supervised:,} supervised tokens, cp {view.cp}"
    ]
    for number, document in enumerate(view.documents):
        first, last = document.runs[0].start, document.runs[-1].end
        lines.append(
            f"\ndocument {number}: {document.sample_id}, tokens {first}..{last - 1}, "
            f"{len(document.images)} images, {document.num_supervised} supervised"
        )
        lines.append(f"  {'tokens':>17}  {'kind':10}  {'positions':>21}  {'owner ranks':11}  content")
        lines += [f"  {_run_line(run, document, view)}" for run in document.runs]
    return "\n".join(lines) + "\n"


def _run_line(run: TokenRun, document: DocumentView, view: PackView) -> str:
    content = run.text.replace("\n", "\\n")
    if len(content) > _SHOWN_TEXT:
        half = _SHOWN_TEXT // 2
        content = f"{content[:half]} ... {content[-half:]}"
    if run.image >= 0:
        path, image = document.images[run.image]
        content = (
            f"image {run.image}: {path} {image.size[0]}x{image.size[1]}, {document.num_tiles[run.image]} tiles, "
            f"stride {document.strides[run.image]}/{view.tokens_per_tile}"
        )
    span = f"{run.start}..{run.end - 1}"
    places = f"{run.first_position:.10g}..{run.last_position:.10g}"
    return f"{span:>17}  {run.kind:10}  {places:>21}  {_owners(run.owners):11}  {content}"


def _owners(owners: Sequence[int]) -> str:
    """0 1 1 0; long lists are cut in the middle."""
    texts = [str(owner) for owner in owners]
    return " ".join(texts if len(texts) <= 6 else [*texts[:3], "..", *texts[-2:]])
