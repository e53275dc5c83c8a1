"""The training loader: planned packs through torch's DataLoader, resumed from a step number.

    MixturePlan --PackRequest--> worker: lines -> encode -> collate, open this rank's images --> list[PackedBatch]

Every rank reads tokens and spans of its data-parallel rank's packs; pixels are decoded only for the tiles that are
assigned to it. Workers get complete requests (byte offsets, image sizes), so they hold no index and no state. Pixels
come back as bytes in shared memory, and how many packs are under way follows from their size.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from megatron_v2pe.batch.packed_batch import PackedBatch, tile_shape
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule, check_batches
from megatron_v2pe.config.fp8 import pack_multiple
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError, DataError, V2PEError
from megatron_v2pe.core.processes import end_with_parent, worker_context
from megatron_v2pe.data.index.annotation_index import DatasetIndex, index_dataset
from megatron_v2pe.data.pack_reader import PackReader, PackRequest, SentPack, TileShare, pack_request
from megatron_v2pe.data.plan.epoch_plan import MixturePlan
from megatron_v2pe.data.samples.settings import SampleSettings, sample_settings
from megatron_v2pe.data.sources.meta import read_meta
from megatron_v2pe.data.system_texts import trained_system

logger = logging.getLogger(__name__)
_TOKEN_BYTES = 20  # id, label and weight
_MOST_PREFETCH = 16  # packs of one worker; more only delays the start


class _RequestSampler(Sampler[PackRequest]):
    """Requests of one data-parallel rank from a step on."""

    def __init__(
        self,
        plan: MixturePlan,
        indexes: Sequence[DatasetIndex],
        *,
        steps: range,
        dp_rank: int,
        dp: int,
    ) -> None:
        self._plan = plan
        self._indexes = indexes
        self._steps = steps
        self._dp_rank = dp_rank
        self._dp = dp

    def __iter__(self) -> Iterator[PackRequest]:
        for step in self._steps:
            for pack in self._plan.packs_of_rank(step, dp_rank=self._dp_rank, dp=self._dp):
                yield pack_request(pack, self._indexes)


def _report(plan: MixturePlan, remark: str) -> None:
    """What a person should know of the data before the first step."""
    plan.log_bad()
    plan.log_notices()
    if remark:
        logger.warning("%s", remark)


def _unchanged(pack: Any) -> Any:
    """Keep torch's default conversion away from packs."""
    return pack


def _start_worker(_worker_id: int) -> None:
    """Torch's own check watches the fork server, which outlives a rank that is killed as long as a worker lives."""
    end_with_parent()


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
    ranks or workers: only the assignment of the packs of a step to data-parallel ranks does.

    Attributes:
        batches: packs of each step, over all data parallel ranks.
        fingerprint: digest of everything that decides the order of the packs.
        facts: the same by name, to report what changed.
        num_bad: samples that are skipped as bad.
        num_samples: samples that may be drawn.
        packs_of_first_epoch: packs of the first epoch.
        system_text: that all samples are trained with; None where they differ.
        source_names: names of the data sets, in the order that `PackedBatch.sources` counts them.
    """

    def __init__(
        self,
        config: RunConfig,
        arch: InternVLArchitecture,
        hf_folder: str | Path,
        *,
        dp_rank: int,
        dp: int,
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
            dp: data-parallel size; must divide the packs of every step.
            tile_rank: rank among those that share the tiles of a pack.
            tile_ranks: how many share them.
            holds_vision: this rank encodes tiles; false opens no image.
            pad_to_multiple: see `collate.collate_pack`.
            start_step: first optimizer step (0-based).

        Raises:
            ConfigError: the batch does not divide, or a path is missing.
            DataError: data that cannot be used; more bad samples than allowed.
        """
        check_batches(config, dp=dp)
        self.batches = batch_schedule(config)
        self._dp = dp
        settings = sample_settings(config, arch, hf_folder)
        indexes, plan = plan_mixture(config, settings)
        self.system_text, remark = trained_system(indexes, settings.text.template)
        if dp_rank == 0 and tile_rank == 0:
            _report(plan, remark)
        check_something_is_learned(config, indexes)
        self.fingerprint = plan.fingerprint
        self.facts = plan.facts
        self.num_bad = plan.num_bad
        self.num_samples = plan.num_samples
        self.packs_of_first_epoch = plan.epoch(0, 0).num_packs
        self.source_names = tuple(index.entry.name for index in indexes)
        reader = PackReader(
            entries=tuple(index.entry for index in indexes),
            settings=settings,
            pad_to_multiple=pad_to_multiple,
            pack_multiple=pack_multiple(config),
            pad_token_id=settings.text.tokenizer.pad_id,
            loss_reduction=config.data.loss_reduction,
            tile_share=TileShare(rank=tile_rank, num_ranks=tile_ranks, holds_vision=holds_vision),
        )
        self._steps = range(start_step, config.optim.steps)
        sampler = _RequestSampler(plan, indexes, steps=self._steps, dp_rank=dp_rank, dp=dp)
        pack_bytes = largest_pack_bytes(config, settings, reader.tile_share)
        self._loader = _torch_loader(config, reader, sampler, pack_bytes=pack_bytes)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        packs = self._received()
        for step in self._steps:
            own = islice(packs, self.batches.size(step) // self._dp)
            yield [_opened(pack) for pack in own]

    def _received(self) -> Iterator[SentPack | V2PEError]:
        """What the workers send; a worker that is killed while it hands over a pack's memory is an error of its own."""
        packs = _started(self._loader)
        while True:
            try:
                pack = next(packs, None)
            except (EOFError, ConnectionError, FileNotFoundError) as error:
                if str(error).startswith("Caught "):  # by a worker, which lives
                    raise
                raise _worker_death(error) from error
            if pack is None:
                return
            yield pack


def check_something_is_learned(config: RunConfig, indexes: Sequence[DatasetIndex]) -> None:
    """Refuse a run whose data give no gradient to what it trains: texts alone, and only image parts trained.

    Raises:
        ConfigError: no sample has an image, and the language model is frozen and has no adapters.
    """
    trains_language = not config.model.freeze_language or config.lora.language_rank > 0
    if not trains_language and not any(int(np.asarray(index.num_tiles).sum()) for index in indexes):
        raise ConfigError(
            "no sample of data.meta has an image, and the language model is frozen (model.freeze_language) and has no "
            "adapters, so nothing that is trained would get a gradient; add data with images, or "
            "train the language model"
        )


def _started(loader: DataLoader[SentPack | V2PEError]) -> Iterator[SentPack | V2PEError]:
    """Start the workers.

    Raises:
        DataError: their locks find no room in shared memory.
    """
    try:
        return iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            "/dev/shm has no room for the locks of loading processes; give the container more shared memory (docker "
            "run --shm-size 8g), or set data.num_workers to 0"
        ) from None


def _opened(pack: SentPack | V2PEError) -> PackedBatch:
    """A pack as it came out of a worker.

    Raises:
        V2PEError: it came in its place.
    """
    if isinstance(pack, V2PEError):
        raise pack
    return pack.unpacked()


def _torch_loader(
    config: RunConfig, reader: PackReader, sampler: _RequestSampler, *, pack_bytes: int
) -> DataLoader[SentPack | V2PEError]:
    num_workers, prefetch = _bounded_workers(config, pack_bytes)
    return DataLoader(
        reader,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        collate_fn=_unchanged,
        multiprocessing_context=worker_context(__name__) if num_workers else None,
        worker_init_fn=_start_worker,
        # Of its own: DataLoader draws a seed when it is iterated, and from the global generator that draw would move
        # drop path and dropout of a resumed run, whose generators were restored before.
        generator=torch.Generator().manual_seed(config.runtime.seed),
    )


def _bounded_workers(config: RunConfig, pack_bytes: int) -> tuple[int, int]:
    """Workers and packs under way of each; says so when the memory allows fewer workers than were asked for."""
    data = config.data
    num_workers, prefetch = packs_under_way(
        pack_bytes, num_workers=data.num_workers, budget=data.prefetch_mib * 2**20
    )
    if num_workers < data.num_workers:
        logger.warning(
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
    sizes = (settings.tiling.image_size, *settings.smaller_sizes)
    return own_tiles * prod(tile_shape(sizes)) + data.max_pack_tokens * _TOKEN_BYTES


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
    """A loader worker that was killed is reported with what to do about it; torch names its number and signal only.

    Torch raises wherever the process is when the worker ends, so the whole loop belongs inside.

    Raises:
        DataError: in the place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _worker_death(error) from error


def _worker_death(error: Exception) -> DataError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(
        f"a data loading process ended ({text}). The usual cause is memory: lower data.prefetch_mib or "
        "data.num_workers, or give the container more shared memory (/dev/shm). Started again, the run continues from "
        "its last checkpoint with the same samples"
    )


def _needed(value: str, field: str, way_out: str) -> str:
    if not value:
        raise ConfigError(f"{field} is empty; {way_out}")
    return value
