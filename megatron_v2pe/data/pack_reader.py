"""What a loader worker runs: a complete request, with byte offsets and image sizes, becomes a pack.

    planned pack --pack_request--> PackRequest --PackReader: line -> encode -> collate, own tiles--> SentPack

A worker holds no index and no state. What it cannot read (a line, an image) it sends as damaged, with the lengths that
were planned, so that the ranks that share a pack agree on its shape; what follows is decided where ranks can talk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from megatron_v2pe.batch.packed_batch import PackedBatch, tile_share
from megatron_v2pe.core.errors import DataError, V2PEError
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.media.cut import Size, UInt8Array
from megatron_v2pe.data.plan.epoch_plan import PlannedPack
from megatron_v2pe.data.samples.draw import Draw, read_sample
from megatron_v2pe.data.samples.encode import EncodedSample, blank_sample
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.samples.split import Units
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import read_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Where one sample is, and what was measured of it."""

    sample_id: str
    dataset: int
    offset: int
    line_number: int
    num_tokens: int
    num_tiles: int
    sizes: tuple[tuple[Size, ...], ...]
    units: Units
    draw: Draw


PackRequest = tuple[SampleRequest, ...]


@dataclass(frozen=True, kw_only=True)
class TileShare:
    """Which tiles of a pack this rank decodes: an even share, or none."""

    rank: int
    num_ranks: int
    holds_vision: bool

    def __call__(self, num_tiles: int) -> tuple[int, int]:
        """Half-open tile range for a pack of `num_tiles`."""
        return tile_share(num_tiles, self.num_ranks, self.rank) if self.holds_vision else (0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SentPack:
    """A pack on its way out of a worker.

    Attributes:
        batch: the pack without its tiles.
        tiles: in shared memory as a tensor; as an array, which goes through a pipe, where shared memory is too small.
    """

    batch: PackedBatch
    tiles: torch.Tensor | UInt8Array

    def unpacked(self) -> PackedBatch:
        """The pack; its tiles still lie in the memory that the worker filled."""
        tiles = self.tiles.numpy() if isinstance(self.tiles, torch.Tensor) else self.tiles
        return replace(self.batch, tiles=tiles)


def sent_tiles(tiles: UInt8Array) -> torch.Tensor | UInt8Array:
    """Tiles in shared memory if they fit; left to torch, a failure would lose the pack, and the rank would wait."""
    tensor = torch.from_numpy(tiles)
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError as error:
        _warn_of_shared_memory(tiles.nbytes, str(error).split("(")[-1].rstrip(")"))
        return tiles


@lru_cache(maxsize=1)  # once for each worker
def _warn_of_shared_memory(num_bytes: int, error: str) -> None:
    logger.warning(
        "/dev/shm has no room for a pack of %.1f MiB (%s); packs go through a pipe, slower. Give the container "
        "more shared memory (docker run --shm-size 8g), or lower data.prefetch_mib",
        num_bytes / 2**20,
        error,
    )


@dataclass(frozen=True, kw_only=True)
class PackReader(Dataset[SentPack | V2PEError]):
    """Turns a request into a pack; what a loader worker runs.

    A sample that cannot be read any more, its line or its images, becomes an entry of `PackedBatch.damaged`. Another
    error of the user's is returned, not raised, so that torch does not bury its message in a worker's traceback.
    """

    entries: tuple[DatasetEntry, ...]
    settings: SampleSettings
    pad_to_multiple: int
    pack_multiple: int
    pad_token_id: int
    loss_reduction: str
    tile_share: TileShare

    def __getitem__(self, request: PackRequest) -> SentPack | V2PEError:
        try:
            batch = collate_pack(
                [self._document_or_blank(sample) for sample in request],
                pad_to_multiple=self.pad_to_multiple,
                pack_multiple=self.pack_multiple,
                pad_token_id=self.pad_token_id,
                loss_reduction=self.loss_reduction,
                image_size=self.settings.tiling.image_size,
                smaller_sizes=self.settings.smaller_sizes,
                tile_range_of=self.tile_share,
                tolerate_damage=True,
            )
        except V2PEError as error:
            return error
        no_tiles = np.empty((0, *batch.tiles.shape[1:]), dtype=np.uint8)
        sources = tuple(sample.dataset for sample in request)
        return SentPack(batch=replace(batch, tiles=no_tiles, sources=sources), tiles=sent_tiles(batch.tiles))

    def _document_or_blank(self, sample: SampleRequest) -> EncodedSample:
        try:
            return self.read_document(sample)
        except DataError as error:
            return blank_sample(
                sample.sample_id,
                num_tokens=sample.num_tokens,
                num_tiles=sample.num_tiles,
                tokens_per_tile=self.settings.text.tokens_per_tile,
                damage=str(error),
            )

    def read_document(self, sample: SampleRequest) -> EncodedSample:
        """One document, without pixels.

        Raises:
            DataError: its line cannot be read, or is not what was measured.
        """
        entry = self.entries[sample.dataset]
        try:
            line = read_line(entry.annotation, sample.offset)
        except OSError as error:
            raise DataError(f"{entry.annotation}:{sample.line_number}: {error.strerror}") from None
        document = read_sample(
            line,
            sample.line_number,
            sample.sizes,
            entry=entry,
            settings=self.settings,
            draw=sample.draw,
            units=sample.units,
        )
        found = (document.layout.num_tokens, document.layout.total_tiles)
        if found != (sample.num_tokens, sample.num_tiles):
            raise DataError(
                f"{entry.annotation}:{sample.line_number}: has {found[0]} tokens and {found[1]} tiles, but had "
                f"{sample.num_tokens} and {sample.num_tiles} when lengths were measured; do not change annotation "
                "files during a run, and start it again"
            )
        return document


def pack_request(pack: PlannedPack, indexes: Sequence[DatasetIndex]) -> PackRequest:
    """What a worker must know to read a planned pack."""
    return tuple(
        _sample_request(
            sample.dataset,
            indexes[sample.dataset],
            sample.row,
            draw=Draw(epoch=pack.epoch, occurrence=sample.occurrence),
        )
        for sample in pack.samples
    )


def _sample_request(dataset: int, index: DatasetIndex, row: int, *, draw: Draw) -> SampleRequest:
    return SampleRequest(
        sample_id=index.sample_id(row),
        dataset=dataset,
        offset=int(index.offsets[row]),
        line_number=int(index.line_numbers[row]),
        num_tokens=int(index.num_tokens[row]),
        num_tiles=int(index.num_tiles[row]),
        sizes=index.media_sizes(row),
        units=index.sample_units(row),
        draw=draw,
    )
