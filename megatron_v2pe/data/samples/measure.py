"""One annotation line to the samples it makes and their lengths: none, one, or the parts of a long one.

    line --parse--> record --probe: headers of its media--> sizes --text ids--> lengths --data.long_samples--> samples

Sizes of the last images are remembered, because mixtures show the same image in many questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import Size
from megatron_v2pe.data.media.image import read_header
from megatron_v2pe.data.media.medium import HeaderOf, ImageHeader
from megatron_v2pe.data.samples.draw import record_tiles
from megatron_v2pe.data.samples.encode import conversation_length, encode_record
from megatron_v2pe.data.samples.notes import image_notes
from megatron_v2pe.data.samples.records import MediaSizes, Record, parse_line, write_images
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.samples.split import WHOLE, Round, Units, part_of, rounds_of, split_units
from megatron_v2pe.data.sources.meta import DatasetEntry

_REMEMBERED_IMAGES = 65536
_NO_LIMIT = 2**62


class LongSampleError(DataError):
    """A sample is longer than allowed, and the policy is not to change it."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Lengths of one sample, known without its pixels.

    Attributes:
        num_tokens: after the cut at the longest sample.
        num_uncut_tokens: before it.
        num_supervised: supervised tokens.
        num_tiles: tiles of all images.
        sizes: (width, height) of each image of each medium.
        notes: of the record and of its images, see `samples.notes`.
    """

    num_tokens: int
    num_uncut_tokens: int
    num_supervised: int
    num_tiles: int
    sizes: tuple[tuple[Size, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MeasuredSample:
    """A sample, or the part of one: which units of the record, and their lengths."""

    units: Units
    measurement: Measurement


def probe_record(
    record: Record, *, settings: SampleSettings, header_of: HeaderOf = read_header
) -> tuple[tuple[ImageHeader, ...], ...]:
    """Headers of the images that each medium of a record shows.

    Args:
        record: see `records.parse_line`.
        settings: of the run.
        header_of: header of an image file; `image.read_header`, or the same with a memory.

    Raises:
        DataError: a medium is not usable.
    """
    return tuple(
        medium.probe(settings.media, sample_id=record.sample_id, header_of=header_of)
        for medium in record.media
    )


def probe_sizes(record: Record, *, settings: SampleSettings) -> tuple[tuple[Size, ...], ...]:
    """(width, height) of each image of each medium of a record, from the files' headers.

    Raises:
        DataError: a medium is not usable.
    """
    return sizes_of(probe_record(record, settings=settings))


def sizes_of(headers: Sequence[Sequence[ImageHeader]]) -> tuple[tuple[Size, ...], ...]:
    """The sizes of headers, medium by medium."""
    return tuple(tuple(header.size for header in own) for own in headers)


def measure_record(
    record: Record, sizes: MediaSizes, *, entry: DatasetEntry, settings: SampleSettings
) -> Measurement:
    """Lengths of a record whose image sizes are known.

    Raises:
        DataError: see `encode.encode_record`.
    """
    media = record_tiles(record, sizes, entry=entry, settings=settings)
    record = write_images(record, sizes)
    num_tiles = [image.grid.num_tiles for each in media for image in each.images]
    uncut, supervised = conversation_length(record.messages, num_tiles=num_tiles, settings=settings.text)
    num_tokens = uncut
    if uncut > settings.text.max_tokens or not supervised:  # the cut decides, and what is wrong is said there
        strides = np.full(len(num_tiles), settings.text.tokens_per_tile, dtype=np.int64)
        sample = encode_record(record, media=media, settings=settings.text, strides=strides)
        num_tokens, supervised = len(sample.tokens), int((sample.labels != IGNORE_INDEX).sum())
    return Measurement(
        num_tokens=num_tokens,
        num_uncut_tokens=uncut,
        num_supervised=supervised,
        num_tiles=sum(num_tiles),
        sizes=tuple(map(tuple, sizes)),
    )


class LineMeasurer:
    """Measures the lines of one data set.

    Args:
        entry: the data set.
        settings: of the run.
    """

    def __init__(self, entry: DatasetEntry, settings: SampleSettings) -> None:
        self._entry = entry
        self._settings = settings
        self._unlimited = replace(settings, text=replace(settings.text, max_tokens=_NO_LIMIT))
        self._header_of = lru_cache(maxsize=_REMEMBERED_IMAGES)(read_header)

    def __call__(self, line: bytes, line_number: int) -> list[MeasuredSample]:
        """The samples of a line.

        Raises:
            LongSampleError: the sample is too long and `data.long_samples` is `bad` or `refuse`.
            DataError: the line, an image or the sample is not usable.
        """
        record = parse_line(line, entry=self._entry, line_number=line_number)
        headers = probe_record(record, settings=self._settings, header_of=self._header_of)
        first, *rest = self._samples(record, sizes_of(headers))
        notes = (*record.notes, *image_notes(headers))
        return [replace(first, measurement=replace(first.measurement, notes=notes)), *rest]

    def _samples(self, record: Record, sizes: tuple[tuple[Size, ...], ...]) -> list[MeasuredSample]:
        if self._settings.long_samples == "cut":
            measured = measure_record(record, sizes, entry=self._entry, settings=self._settings)
            return [MeasuredSample(units=WHOLE, measurement=measured)]
        whole = self._measure(record, sizes, WHOLE)
        if self._fits(whole):
            return [MeasuredSample(units=WHOLE, measurement=whole)]
        way_out = next((medium.way_to_shorten for medium in record.media if medium.way_to_shorten), "")
        if self._settings.long_samples == "split" and not way_out:
            return self._split(record, sizes)
        raise LongSampleError(
            f"{record.where}: {whole.num_tokens} tokens and {whole.num_tiles} tiles exceed data.max_sample_tokens = "
            f"{self._settings.text.max_tokens} or data.max_pack_tiles = {self._settings.max_pack_tiles}; raise the "
            f"limit, shorten the sample, or {way_out or 'set data.long_samples to split or cut'}"
        )

    def _split(self, record: Record, sizes: MediaSizes) -> list[MeasuredSample]:
        measured: dict[Units, Measurement] = {}
        rounds = rounds_of(record)

        def fits(units: Units) -> bool:
            measured[units] = self._measure(record, sizes, units, rounds=rounds)
            return self._fits(measured[units])

        try:
            parts = split_units(record, rounds, fits=fits)
        except DataError as error:
            raise LongSampleError(str(error)) from None
        return [MeasuredSample(units=units, measurement=measured[units]) for units in parts]

    def _measure(
        self, record: Record, sizes: MediaSizes, units: Units, *, rounds: Sequence[Round] | None = None
    ) -> Measurement:
        part, media = part_of(record, units, rounds=rounds)
        own = [sizes[number] for number in media]
        return measure_record(part, own, entry=self._entry, settings=self._unlimited)

    def _fits(self, measured: Measurement) -> bool:
        settings = self._settings
        return (
            measured.num_tokens <= settings.text.max_tokens and measured.num_tiles <= settings.max_pack_tiles
        )
