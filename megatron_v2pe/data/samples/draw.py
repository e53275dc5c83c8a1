"""One draw of a sample: a line that was measured becomes tokens, positions and the plan of its tiles.

    line --parse--> record --part--> its media --tiles--> grids, qualities --encode--> EncodedSample

No media file is opened. Random choices depend on the run's seed, the epoch and the sample only.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.data.media.cut import CutRule
from megatron_v2pe.data.media.medium import DrawSeed, MediumTiles
from megatron_v2pe.data.media.normalization import mean_color
from megatron_v2pe.data.media.tiling import rule_for_sample
from megatron_v2pe.data.samples.encode import EncodedSample, encode_record
from megatron_v2pe.data.samples.records import MediaSizes, Record, check_sizes, parse_line, write_images
from megatron_v2pe.data.samples.settings import SampleSettings, dataset_tiling
from megatron_v2pe.data.samples.split import WHOLE, Units, part_of
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.v2pe.strides import image_strides


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of a sample: what random choices depend on, besides the run's seed.

    Attributes:
        epoch: number of the epoch, unique over the run.
        occurrence: 0 for the first time in this epoch, 1 for the second, ...
    """

    epoch: int
    occurrence: int = 0

    def seed(self, sample_id: str, *, run_seed: int) -> DrawSeed:
        """Source of the random choices for one sample."""
        identity = sample_id if self.occurrence == 0 else f"{sample_id}#{self.occurrence}"
        return DrawSeed(seed=run_seed, epoch=self.epoch, identity=identity)


def record_tiles(
    record: Record,
    sizes: MediaSizes,
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    draw: Draw | None = None,
) -> tuple[MediumTiles, ...]:
    """How each image of a record is cut; with a draw, also how it is augmented.

    Raises:
        DataError: the record does not have so many images, or one is too large to be padded.
    """
    seed = (draw or Draw(epoch=0)).seed(record.sample_id, run_seed=settings.seed)
    is_padded = settings.pad2square and not entry.data_augment
    rule = CutRule(
        tiling=rule_for_sample(dataset_tiling(settings, entry), sum(map(len, sizes))),
        pad_color=mean_color(settings.normalize_type) if is_padded else None,
        augment=seed.generator("augmentation") if entry.data_augment and draw is not None else None,
        max_pixels=settings.media.max_pixels,
    )
    return tuple(
        MediumTiles(medium=medium, images=medium.tiles(own, rule), rules=settings.media, seed=seed)
        for medium, own in zip(record.media, check_sizes(record, sizes), strict=True)
    )


def encode_draw(
    record: Record,
    sizes: MediaSizes,
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    draw: Draw,
) -> EncodedSample:
    """Encode one draw of a record whose image sizes are known.

    Raises:
        DataError: see `encode.encode_record`.
    """
    strides = image_strides(
        settings.position.mode,
        sum(map(len, sizes)),
        tokens_per_tile=settings.text.tokens_per_tile,
        stride=settings.position.stride or None,
        generator=draw.seed(record.sample_id, run_seed=settings.seed).generator(),
    )
    media = record_tiles(record, sizes, entry=entry, settings=settings, draw=draw)
    return encode_record(write_images(record, sizes), media=media, settings=settings.text, strides=strides)


def read_sample(
    line: bytes,
    line_number: int,
    sizes: MediaSizes,
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    draw: Draw,
    units: Units = WHOLE,
) -> EncodedSample:
    """Parse and encode a line that was measured before.

    Args:
        line: as read from the annotation file.
        line_number: 1-based.
        sizes: (width, height) of each image of each medium, of the part that is wanted.
        entry: its data set.
        settings: of the run.
        draw: what random choices depend on.
        units: the part of a long sample that is wanted, see `split`.

    Raises:
        DataError: the line or the sample is not usable, or has changed since it was measured.
    """
    record, _ = part_of(parse_line(line, entry=entry, line_number=line_number), units)
    return encode_draw(record, sizes, entry=entry, settings=settings, draw=draw)
