"""One annotation line to the samples it makes and their lengths: none, one, or the parts of a long one.

    line --parse--> record --image headers--> sizes --text ids--> lengths --data.long_samples--> samples

Sizes of the last images are remembered, because mixtures show the same image in many questions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.images import check_image
from megatron_v2pe.data.samples.records import Record, parse_line
from megatron_v2pe.data.samples.sample_maker import (
    Measurement,
    SampleSettings,
    Size,
    measure_record,
    record_sizes,
)
from megatron_v2pe.data.samples.split import WHOLE, Units, part_of, split_units
from megatron_v2pe.data.sources.meta import DatasetEntry

_REMEMBERED_IMAGES = 65536
_NO_LIMIT = 2**62


class LongSampleError(DataError):
    """A sample is longer than allowed, and the policy is not to change it."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSample:
    """A sample, or the part of one: which units of the record, and their lengths."""

    units: Units
    measurement: Measurement


class LineMeasurer:
    """Measures the lines of one data set.

    Args:
        entry: the data set.
        settings: of the run.
    """

    def __init__(self, entry: DatasetEntry, settings: SampleSettings) -> None:
        self._entry, self._settings = entry, settings
        self._unlimited = replace(settings, text=replace(settings.text, max_tokens=_NO_LIMIT))
        self._size_of = lru_cache(maxsize=_REMEMBERED_IMAGES)(check_image)

    def __call__(self, line: bytes, line_number: int) -> list[MeasuredSample]:
        """The samples of a line.

        Raises:
            LongSampleError: the sample is too long and `data.long_samples` is `bad` or `refuse`.
            DataError: the line, an image or the sample is not usable.
        """
        record = parse_line(line, entry=self._entry, line_number=line_number)
        sizes = record_sizes(record, settings=self._settings, size_of=self._size_of)
        if self._settings.long_samples == "cut":
            measured = measure_record(record, sizes, entry=self._entry, settings=self._settings)
            return [MeasuredSample(units=WHOLE, measurement=measured)]
        whole = self._measure(record, sizes, WHOLE)
        if self._fits(whole):
            return [MeasuredSample(units=WHOLE, measurement=whole)]
        if self._settings.long_samples == "split" and record.video is None:
            return self._split(record, sizes)
        way_out = (
            "or set data.long_samples to split or cut"
            if record.video is None
            else "or lower data.max_num_frame (a video is not split)"
        )
        raise LongSampleError(
            f"{record.where}: {whole.num_tokens} tokens and {whole.num_tiles} tiles exceed data.max_sample_tokens = "
            f"{self._settings.text.max_tokens} or data.max_pack_tiles = {self._settings.max_pack_tiles}; raise the "
            f"limit, shorten the sample, {way_out}"
        )

    def _split(self, record: Record, sizes: tuple[Size, ...]) -> list[MeasuredSample]:
        measured: dict[Units, Measurement] = {}

        def fits(units: Units) -> bool:
            measured[units] = self._measure(record, sizes, units)
            return self._fits(measured[units])

        try:
            parts = split_units(record, fits=fits)
        except DataError as error:
            raise LongSampleError(str(error)) from None
        return [MeasuredSample(units=units, measurement=measured[units]) for units in parts]

    def _measure(self, record: Record, sizes: tuple[Size, ...], units: Units) -> Measurement:
        part, images = part_of(record, units)
        own = sizes if units == WHOLE else [sizes[image] for image in images]  # a video lists no image
        return measure_record(part, own, entry=self._entry, settings=self._unlimited)

    def _fits(self, measured: Measurement) -> bool:
        settings = self._settings
        return (
            measured.num_tokens <= settings.text.max_tokens and measured.num_tiles <= settings.max_pack_tiles
        )
