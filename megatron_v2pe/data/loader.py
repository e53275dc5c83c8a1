"""The training loader: planned packs through torch's DataLoader, resumed from a step number.

    MixturePlan --PackRequest--> worker: lines -> encode -> collate, open this rank's images --> list[PackedBatch]

Every rank reads tokens and spans of its data-parallel rank's packs; pixels are decoded only for the tiles that are
dealt to it. Workers get complete requests (byte offsets, image sizes), so they hold no index and no state. Pixels
come back as bytes in shared memory, and how many packs are under way follows from their size.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_v2pe.batch.packed_batch import PackedBatch, deal_tiles
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule, check_batches
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError, DataError, V2PEError
from megatron_v2pe.core.logging import get_logger
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.encode import EncodedSample
from megatron_v2pe.data.index import DatasetIndex, index_dataset
from megatron_v2pe.data.meta import DatasetEntry, read_meta
from megatron_v2pe.data.plan import MixturePlan, PlannedPack
from megatron_v2pe.data.samples import Draw, SampleSettings, Size, read_sample, sample_settings
from megatron_v2pe.data.split import Units
from megatron_v2pe.data.storage import read_line

_log = get_logger(__name__)
_TOKEN_BYTES = 20  # id, label and weight
_MOST_PREFETCH = 16  # packs of one worker; more only delays the start


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Where one sample stands, and what was measured of it."""

    dataset: int
    offset: int
    line_number: int
    sizes: tuple[Size, ...]
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
        return deal_tiles(num_tiles, self.num_ranks, self.rank) if self.holds_vision else (0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class SentPack:
    """A pack on its way out of a worker: its tiles as a tensor, which torch hands over in shared memory."""

    batch: PackedBatch
    tiles: torch.Tensor

    def unpacked(self) -> PackedBatch:
        """The pack; its tiles still lie in the memory that the worker filled."""
        return replace(self.batch, tiles=self.tiles.numpy())


@dataclass(frozen=True, kw_only=True)
class PackReader(Dataset[SentPack | V2PEError]):
    """Turns a request into a pack; what a loader worker runs.

    An error of the user's is returned, not raised, so that torch does not bury its message in a worker's traceback.
    """

    entries: tuple[DatasetEntry, ...]
    settings: SampleSettings
    pad_to_multiple: int
    pad_token_id: int
    loss_reduction: str
    tile_share: TileShare

    def __getitem__(self, request: PackRequest) -> SentPack | V2PEError:
        try:
            batch = collate_pack(
                [self.read_document(sample) for sample in request],
                pad_to_multiple=self.pad_to_multiple,
                pad_token_id=self.pad_token_id,
                loss_reduction=self.loss_reduction,
                image_size=self.settings.tiling.image_size,
                tile_range_of=self.tile_share,
                tolerate_damage=True,
            )
        except V2PEError as error:
            return error
        no_tiles = np.empty((0, *batch.tiles.shape[1:]), dtype=np.uint8)
        sources = tuple(sample.dataset for sample in request)
        return SentPack(
            batch=replace(batch, tiles=no_tiles, sources=sources), tiles=torch.from_numpy(batch.tiles)
        )

    def read_document(self, sample: SampleRequest) -> EncodedSample:
        """One document, without pixels."""
        entry = self.entries[sample.dataset]
        try:
            line = read_line(entry.annotation, sample.offset)
        except OSError as error:
            raise DataError(f"{entry.annotation}: {error.strerror}") from None
        return read_sample(
            line,
            sample.line_number,
            sample.sizes,
            entry=entry,
            settings=self.settings,
            draw=sample.draw,
            units=sample.units,
        )


class _RequestSampler(Sampler[PackRequest]):
    """Requests of one data-parallel rank from a step on."""

    def __init__(
        self,
        plan: MixturePlan,
        indexes: Sequence[DatasetIndex],
        *,
        steps: range,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self._plan, self._indexes, self._steps = plan, indexes, steps
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[PackRequest]:
        for step in self._steps:
            for pack in self._plan.packs_of_rank(step, dp_rank=self._dp_rank, dp_size=self._dp_size):
                yield pack_request(pack, self._indexes)


def pack_request(pack: PlannedPack, indexes: Sequence[DatasetIndex]) -> PackRequest:
    """What a worker must know to read a planned pack."""
    return tuple(
        SampleRequest(
            dataset=sample.dataset,
            offset=int(indexes[sample.dataset].offsets[sample.row]),
            line_number=int(indexes[sample.dataset].line_numbers[sample.row]),
            sizes=tuple(indexes[sample.dataset].image_sizes(sample.row)),
            units=indexes[sample.dataset].sample_units(sample.row),
            draw=Draw(epoch=pack.epoch, occurrence=sample.occurrence),
        )
        for sample in pack.samples
    )


def _unchanged(pack: Any) -> Any:
    """Keep torch's default conversion away from packs."""
    return pack


def plan_mixture(
    config: RunConfig, settings: SampleSettings, *, workers: int = 1, show_progress: bool = False
) -> tuple[tuple[DatasetIndex, ...], MixturePlan]:
    """Measure the data sets of `data.meta`, or read their measurements, and plan the run.

    Args:
        config: sections data, optim and runtime are read.
        settings: see `samples.sample_settings`.
        workers: processes that measure what is not known yet.
        show_progress: draw progress bars.

    Raises:
        ConfigError: a path is not given.
        DataError: data that cannot be used; more bad samples than allowed.
    """
    entries = read_meta(_needed(config.data.meta, "data.meta", "give the meta json of the data"))
    cache_dir = config.data.cache_dir
    if not cache_dir:
        run_dir = _needed(config.runtime.run_dir, "runtime.run_dir", "give it, or data.cache_dir")
        cache_dir = str(Path(run_dir) / "data_cache")
    indexes = tuple(
        index_dataset(
            entry, settings=settings, cache_dir=cache_dir, workers=workers, show_progress=show_progress
        )
        for entry in entries
    )
    plan = MixturePlan(
        indexes,
        data=config.data,
        seed=config.runtime.seed,
        batches=batch_schedule(config),
        cost=settings.cost,
        cache_dir=cache_dir,
    )
    return indexes, plan


class TrainLoader:
    """Micro batches of one rank, step by step.

    Iterating yields, for each optimizer step from `start_step` to `optim.steps` - 1, this data-parallel rank's
    micro batches. Order and content depend on the data, the configuration and the step, not on the number of
    ranks or workers: only which data-parallel rank takes which pack of a step does.

    Attributes:
        batches: packs of each step, over all data parallel ranks.
        fingerprint: digest of everything that decides the order of the packs.
        facts: the same by name, to tell what changed.
        num_bad: samples that are skipped as bad.
        num_samples: samples that may be drawn.
        source_names: names of the data sets, in the order that `PackedBatch.sources` counts them.
    """

    def __init__(
        self,
        config: RunConfig,
        arch: InternVLArchitecture,
        hf_folder: str | Path,
        *,
        dp_rank: int,
        dp_size: int,
        tile_rank: int,
        tile_ranks: int,
        holds_vision: bool,
        pad_to_multiple: int,
        start_step: int,
    ) -> None:
        """Plan the run; see `plan_mixture`.

        Args:
            config: sections data, position, optim and runtime are read.
            arch: of the checkpoint that is trained.
            hf_folder: Hugging Face folder with the tokenizer files.
            dp_rank: data-parallel rank.
            dp_size: data-parallel size; must divide the packs of every step.
            tile_rank: rank among those that share the tiles of a pack.
            tile_ranks: how many share them.
            holds_vision: this rank encodes tiles; false opens no image.
            pad_to_multiple: see `collate.collate_pack`.
            start_step: first optimizer step (0-based).

        Raises:
            ConfigError: the batch does not divide, or a path is missing.
            DataError: data that cannot be used; more bad samples than allowed.
        """
        check_batches(config, dp_size=dp_size)
        self.batches, self._dp_size = batch_schedule(config), dp_size
        settings = sample_settings(config, arch, hf_folder)
        indexes, plan = plan_mixture(config, settings)
        if dp_rank == 0 and tile_rank == 0:
            plan.log_bad()
        self.fingerprint, self.num_bad, self.num_samples = plan.fingerprint, plan.num_bad, plan.num_samples
        self.facts = plan.facts
        self.source_names = tuple(index.entry.name for index in indexes)
        reader = PackReader(
            entries=tuple(index.entry for index in indexes),
            settings=settings,
            pad_to_multiple=pad_to_multiple,
            pad_token_id=settings.text.tokenizer.pad_id,
            loss_reduction=config.data.loss_reduction,
            tile_share=TileShare(rank=tile_rank, num_ranks=tile_ranks, holds_vision=holds_vision),
        )
        num_workers, prefetch = _bounded_workers(
            config, largest_pack_bytes(config, settings, reader.tile_share)
        )
        self._steps = range(start_step, config.optim.steps)
        self._loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_RequestSampler(plan, indexes, steps=self._steps, dp_rank=dp_rank, dp_size=dp_size),
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            collate_fn=_unchanged,
            multiprocessing_context=_worker_context() if num_workers else None,
        )

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        packs = iter(self._loader)
        for step in self._steps:
            own = islice(packs, self.batches.size(step) // self._dp_size)
            yield [_opened(pack) for pack in own]


def _opened(pack: SentPack | V2PEError) -> PackedBatch:
    """A pack as it came out of a worker.

    Raises:
        V2PEError: it came in its place.
    """
    if isinstance(pack, V2PEError):
        raise pack
    return pack.unpacked()


def _bounded_workers(config: RunConfig, pack_bytes: int) -> tuple[int, int]:
    """Workers and packs under way of each; says so when the memory allows fewer workers than were asked for."""
    data = config.data
    num_workers, prefetch = packs_under_way(
        pack_bytes, num_workers=data.num_workers, budget=data.prefetch_mib * 2**20
    )
    if num_workers < data.num_workers:
        _log.warning(
            "data.num_workers is %d, but packs of up to %.1f MiB in data.prefetch_mib = %d leave room for %d",
            data.num_workers,
            pack_bytes / 2**20,
            data.prefetch_mib,
            num_workers,
        )
    return num_workers, prefetch


def largest_pack_bytes(config: RunConfig, settings: SampleSettings, share: TileShare) -> int:
    """Bytes of the largest pack that a worker of this rank may have to hand over."""
    data = config.data
    tiles = min(data.max_pack_tiles, data.max_pack_tokens // settings.text.tokens_per_tile)
    own_tiles = -(-tiles // share.num_ranks) if share.holds_vision else 0
    return own_tiles * 3 * settings.tiling.image_size**2 + data.max_pack_tokens * _TOKEN_BYTES


def packs_under_way(pack_bytes: int, *, num_workers: int, budget: int) -> tuple[int, int]:
    """How many workers make packs, and how many each has under way, within a budget; never fewer than one.

    Example: packs of 75 MiB and 2 GiB for 4 workers: 6 packs each. Packs of 600 MiB: 3 workers, one pack each.

    Args:
        pack_bytes: of the largest pack.
        num_workers: wanted.
        budget: bytes of packs that are made but not yet used.
    """
    packs = max(1, budget // max(1, pack_bytes))
    workers = min(num_workers, packs)
    return workers, min(_MOST_PREFETCH, max(1, packs // max(1, workers)))


@contextmanager
def explained_worker_deaths() -> Iterator[None]:
    """A loader worker that was killed is reported by what to do about it; torch tells its number and signal.

    Torch raises wherever the process is when the worker ends, so the whole loop belongs inside.

    Raises:
        DataError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a data loading process ended ({' '.join(str(error).split())}). The usual cause is memory: lower "
            "data.prefetch_mib or data.num_workers, or give the container more shared memory (/dev/shm). Started "
            "again, the run goes on from its last checkpoint with the same samples"
        ) from error


def _worker_context() -> BaseContext:
    """Workers are forked from a fresh server process that has imported this module once.

    They are not forked from here: gloo or CUDA threads of this process would be inherited in a broken state.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _needed(value: str, field: str, way_out: str) -> str:
    if not value:
        raise ConfigError(f"{field} is empty; {way_out}")
    return value
