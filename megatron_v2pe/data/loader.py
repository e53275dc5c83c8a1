"""The training loader: planned packs through torch's DataLoader, resumed from a step number.

    MixturePlan --PackRequest--> worker: lines -> encode -> collate, open this rank's images --> list[PackedBatch]

Every rank reads tokens and spans of its data-parallel rank's packs; pixels are decoded only for the tiles that are
dealt to it. Workers get complete requests (byte offsets, image sizes), so they hold no index and no state.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_v2pe.batch.packed_batch import PackedBatch, deal_tiles
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.collate import collate_pack
from megatron_v2pe.data.encode import EncodedSample
from megatron_v2pe.data.index import DatasetIndex, index_dataset
from megatron_v2pe.data.meta import DatasetEntry, read_meta
from megatron_v2pe.data.plan import MixturePlan, PlannedPack
from megatron_v2pe.data.samples import Draw, SampleSettings, Size, read_sample, sample_settings


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Where one sample stands, and what was measured of it."""

    dataset: int
    offset: int
    line_number: int
    sizes: tuple[Size, ...]
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


@dataclass(frozen=True, kw_only=True)
class PackReader(Dataset[PackedBatch | DataError]):
    """Turns a request into a pack; what a loader worker runs.

    A DataError is returned, not raised, so that torch does not bury its message in a worker's traceback.
    """

    entries: tuple[DatasetEntry, ...]
    settings: SampleSettings
    pad_to_multiple: int
    pad_token_id: int
    loss_reduction: str
    tile_share: TileShare

    def __getitem__(self, request: PackRequest) -> PackedBatch | DataError:
        try:
            return collate_pack(
                [self._read(sample) for sample in request],
                pad_to_multiple=self.pad_to_multiple,
                pad_token_id=self.pad_token_id,
                loss_reduction=self.loss_reduction,
                image_size=self.settings.tiling.image_size,
                tile_range_of=self.tile_share,
            )
        except DataError as error:
            return error

    def _read(self, sample: SampleRequest) -> EncodedSample:
        entry = self.entries[sample.dataset]
        try:
            with open(entry.annotation, "rb") as file:
                file.seek(sample.offset)
                line = file.readline()
        except OSError as error:
            raise DataError(f"{entry.annotation}: {error.strerror}") from None
        return read_sample(
            line, sample.line_number, sample.sizes, entry=entry, settings=self.settings, draw=sample.draw
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
            for pack in self._plan.packs_of_step(step)[self._dp_rank :: self._dp_size]:
                yield self._request(pack)

    def _request(self, pack: PlannedPack) -> PackRequest:
        return tuple(
            SampleRequest(
                dataset=sample.dataset,
                offset=int(self._indexes[sample.dataset].offsets[sample.row]),
                line_number=int(self._indexes[sample.dataset].line_numbers[sample.row]),
                sizes=tuple(self._indexes[sample.dataset].image_sizes(sample.row)),
                draw=Draw(epoch=pack.epoch, occurrence=sample.occurrence),
            )
            for sample in pack.samples
        )


def _unchanged(pack: Any) -> Any:
    """Keep torch's default conversion away from packs."""
    return pack


def plan_mixture(config: RunConfig, settings: SampleSettings) -> tuple[tuple[DatasetIndex, ...], MixturePlan]:
    """Measure the data sets of `data.meta`, or read their measurements, and plan the run.

    Raises:
        ConfigError: a path is not given.
        DataError: data that cannot be used; more bad samples than allowed.
    """
    entries = read_meta(_needed(config.data.meta, "data.meta", "give the meta json of the data"))
    cache_dir = config.data.cache_dir
    if not cache_dir:
        run_dir = _needed(config.runtime.run_dir, "runtime.run_dir", "give it, or data.cache_dir")
        cache_dir = str(Path(run_dir) / "data_cache")
    indexes = tuple(index_dataset(entry, settings=settings, cache_dir=cache_dir) for entry in entries)
    plan = MixturePlan(
        indexes,
        data=config.data,
        seed=config.runtime.seed,
        global_batch_size=config.optim.global_batch_size,
    )
    return indexes, plan


class TrainLoader:
    """Micro batches of one rank, step by step.

    Iterating yields, for each optimizer step from `start_step` to `optim.steps` - 1, this data-parallel rank's
    micro batches. Order and content depend on the data, the configuration and the step, not on the number of
    ranks or workers: pack i of a step goes to data-parallel rank i mod dp_size.

    Attributes:
        fingerprint: digest of everything that decides the order of the packs.
        num_bad: samples that are skipped as bad.
        num_samples: samples that may be drawn.
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
            dp_size: data-parallel size; must divide optim.global_batch_size.
            tile_rank: rank among those that share the tiles of a pack.
            tile_ranks: how many share them.
            holds_vision: this rank encodes tiles; false opens no image.
            pad_to_multiple: see `collate.collate_pack`.
            start_step: first optimizer step (0-based).

        Raises:
            ConfigError: the batch does not divide, or a path is missing.
            DataError: data that cannot be used; more bad samples than allowed.
        """
        if config.optim.global_batch_size % dp_size:
            raise ConfigError(
                f"optim.global_batch_size is {config.optim.global_batch_size}, but the data-parallel size "
                f"{dp_size} must divide it"
            )
        self._num_micro_batches = config.optim.global_batch_size // dp_size
        settings = sample_settings(config, arch, hf_folder)
        indexes, plan = plan_mixture(config, settings)
        if dp_rank == 0 and tile_rank == 0:
            plan.log_bad()
        self.fingerprint, self.num_bad, self.num_samples = plan.fingerprint, plan.num_bad, plan.num_samples
        reader = PackReader(
            entries=tuple(index.entry for index in indexes),
            settings=settings,
            pad_to_multiple=pad_to_multiple,
            pad_token_id=settings.text.tokenizer.pad_id,
            loss_reduction=config.data.loss_reduction,
            tile_share=TileShare(rank=tile_rank, num_ranks=tile_ranks, holds_vision=holds_vision),
        )
        steps = range(start_step, config.optim.steps)
        self._loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_RequestSampler(plan, indexes, steps=steps, dp_rank=dp_rank, dp_size=dp_size),
            num_workers=config.data.num_workers,
            collate_fn=_unchanged,
            multiprocessing_context=_worker_context() if config.data.num_workers else None,
        )

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        micro_batches: list[PackedBatch] = []
        for pack in self._loader:
            if isinstance(pack, DataError):
                raise pack
            micro_batches.append(pack)
            if len(micro_batches) == self._num_micro_batches:
                yield micro_batches
                micro_batches = []


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
