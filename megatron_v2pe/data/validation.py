"""Held-out data: every sample once, in packs that do not depend on the layout of ranks.

    data.validation --index--> samples in order --next fit--> packs --pack r * dp + i to dp rank i, r = 0, 1, ...-->

Samples are drawn as in epoch 0 without augmentation, so that strides and frames are the same at every validation. All
data parallel ranks run as many packs, since experts may be spread over them, and pipelines with virtual stages run a
multiple of their length: where no pack is left, a rank runs the first one again without loss.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.fp8 import pack_multiple
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import DataError, V2PEError
from megatron_v2pe.data.index.annotation_index import DatasetIndex, index_dataset
from megatron_v2pe.data.pack_reader import PackReader, PackRequest, TileShare, pack_request
from megatron_v2pe.data.plan.epoch_plan import PlannedPack, PlannedSample
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.sources.meta import read_meta

_log = logging.getLogger(__name__)
SHORTEST_BUCKET = 1024  # tokens; the next ones end at twice as many each


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of one data set and one range of lengths.

    Attributes:
        source: name of the data set.
        max_tokens: longest sample of the range; the shortest is half of it plus one, or 1.
    """

    source: str
    max_tokens: int

    @property
    def length_name(self) -> str:
        """Name of the range in metrics.

        Example: `up_to_2048`.
        """
        return f"up_to_{self.max_tokens}"


def bucket_of(num_tokens: int) -> int:
    """Upper end of the range of lengths that a sample belongs to: 1024, 2048, 4096, ..."""
    end = SHORTEST_BUCKET
    while end < num_tokens:
        end *= 2
    return end


class ValidationPacks:
    """Packs of the held-out data for one rank.

    Args:
        meta: meta json of the data sets.
        config: sections data, position and runtime are read.
        arch: of the checkpoint that is trained.
        hf_folder: Hugging Face folder with the tokenizer files.
        dp_rank: data parallel rank.
        dp: data parallel size.
        tile_share: tiles of a pack that this rank decodes.
        pad_to_multiple: see `collate.collate_pack`.
        runs_multiple: each rank's runs are a multiple of it.
        field: configuration field that names the data, for messages.

    Attributes:
        groups: what losses are kept apart by; `PackedBatch.sources` counts them.
        num_samples: of all data sets.
        num_packs: of all ranks.

    Raises:
        DataError: no sample can be used, or more are bad than `data.max_bad_samples` allows.
    """

    def __init__(
        self,
        meta: str,
        config: RunConfig,
        arch: InternVLArchitecture,
        hf_folder: str | Path,
        *,
        dp_rank: int,
        dp: int,
        tile_share: TileShare,
        pad_to_multiple: int,
        runs_multiple: int = 1,
        field: str = "data.validation",
    ) -> None:
        settings = sample_settings(config, arch, hf_folder)
        cache_dir = config.data.cache_dir or str(Path(config.runtime.run_dir) / "data_cache")
        entries = tuple(replace(entry, data_augment=False) for entry in read_meta(meta))
        indexes = tuple(index_dataset(entry, settings=settings, cache_dir=cache_dir) for entry in entries)
        samples = _fit_samples(config, indexes, field)
        self.num_samples = len(samples)
        packs = _next_fit(config, indexes, samples)
        self.num_packs = len(packs)
        lengths = sorted({bucket_of(int(indexes[s.dataset].num_tokens[s.row])) for s in samples})
        self.groups = tuple(
            Group(source=entry.name, max_tokens=length) for entry in entries for length in lengths
        )
        self._lengths = lengths
        places = _places(len(packs), dp_rank=dp_rank, dp=dp, multiple=runs_multiple)
        self._own = [packs[place] if place < len(packs) else None for place in places]
        self._filler = packs[0]
        self._threads = max(1, config.data.num_workers)
        self._reader = PackReader(
            entries=entries,
            settings=settings,
            pad_to_multiple=pad_to_multiple,
            pack_multiple=pack_multiple(config),
            pad_token_id=settings.text.tokenizer.pad_id,
            loss_reduction=config.data.loss_reduction,
            tile_share=tile_share,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        """This rank's packs in order; images are read ahead by threads.

        Raises:
            DataError: a sample cannot be read.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            yield from pool.map(self._read, self._own)

    def _read(self, request: PackRequest | None) -> PackedBatch:
        sent = self._reader[request if request is not None else self._filler]
        if isinstance(sent, V2PEError):
            raise sent
        batch = sent.unpacked()
        if request is None:
            batch = replace(batch, loss_weights=np.zeros_like(batch.loss_weights))
        return replace(batch, sources=self._groups_of(batch))

    def _groups_of(self, batch: PackedBatch) -> tuple[int, ...]:
        """Group of each document, from its data set and length."""
        return tuple(
            source * len(self._lengths) + self._lengths.index(bucket_of(document.num_tokens))
            for source, document in zip(batch.sources, batch.layout.documents, strict=True)
        )


def _places(count: int, *, dp_rank: int, dp: int, multiple: int) -> range:
    """Numbers of a rank's packs; those from `count` on are runs without loss.

    Example: 3 packs on 2 ranks: rank 0 has 0 and 2, rank 1 has 1 and 3, which is none.
    """
    runs = -(-count // (dp * multiple)) * multiple
    return range(dp_rank, runs * dp, dp)


def _fit_samples(config: RunConfig, indexes: tuple[DatasetIndex, ...], field: str) -> list[PlannedSample]:
    """Samples in the order of the files, without those that cannot be used."""
    data = config.data
    samples, num_bad = [], 0
    for number, index in enumerate(indexes):
        is_fit = (
            (index.num_supervised > 0)
            & (index.num_tokens <= data.max_pack_tokens)
            & (index.num_tiles <= data.max_pack_tiles)
        )
        samples += [
            PlannedSample(dataset=number, row=int(row), occurrence=0) for row in np.flatnonzero(is_fit)
        ]
        num_bad += len(index.bad) + int((~is_fit).sum())
    total = len(samples) + num_bad
    if not samples or num_bad > data.max_bad_samples * total:
        first = next((bad for index in indexes for bad in index.bad), None)
        reason = f"; the first is {first}" if first else "; samples without a label, or longer than a pack"
        raise DataError(
            f"{field}: {num_bad} of {total} samples cannot be used, more than data.max_bad_samples = "
            f"{data.max_bad_samples} allows{reason}"
        )
    if num_bad:
        _log.warning("%s: %d of %d samples cannot be used and are left out", field, num_bad, total)
    return samples


def _next_fit(
    config: RunConfig, indexes: tuple[DatasetIndex, ...], samples: list[PlannedSample]
) -> list[PackRequest]:
    """Samples in order, a new pack where the last one has no room."""
    packs: list[list[PlannedSample]] = []
    tokens = tiles = 0
    for sample in samples:
        index = indexes[sample.dataset]
        own_tokens, own_tiles = int(index.num_tokens[sample.row]), int(index.num_tiles[sample.row])
        is_full = (
            tokens + own_tokens > config.data.max_pack_tokens
            or tiles + own_tiles > config.data.max_pack_tiles
        )
        if not packs or is_full:
            packs.append([])
            tokens = tiles = 0
        packs[-1].append(sample)
        tokens, tiles = tokens + own_tokens, tiles + own_tiles
    return [pack_request(PlannedPack(epoch=0, samples=tuple(pack), cost=0.0), indexes) for pack in packs]
