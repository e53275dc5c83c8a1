"""From one annotation line to an encoded sample: the settings of a run applied to a record.

Two uses: `measure_line` (line -> lengths and image sizes; opens image headers) serves the index once, and
`read_sample` (line + image sizes -> EncodedSample; opens no image) serves every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import PositionConfig, RunConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.frames import DEFAULT_RULE, FrameDraw, FrameRef, VideoRule, draw_places
from megatron_v2pe.data.media.images import ImageRef, NormalizeType, check_image, mean_color
from megatron_v2pe.data.media.pixels import measure_video
from megatron_v2pe.data.media.tiling import TilingRule, choose_grid, rule_for_sample
from megatron_v2pe.data.samples.cost import NO_COST, PackCost, pack_cost
from megatron_v2pe.data.samples.encode import EncodedSample, TextSettings, conversation_length, encode_record
from megatron_v2pe.data.samples.records import Record, parse_line, with_frames
from megatron_v2pe.data.samples.split import WHOLE, Units, part_of
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.text.templates import get_template
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from megatron_v2pe.v2pe.strides import image_strides, sample_generator

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Everything that decides what a line becomes.

    Attributes:
        text: tokenizer, template, longest sample.
        tiling: rule of the run; a data set may override parts of it.
        pad2square: pad an image that is not tiled and not augmented.
        normalize_type: its mean is the padding colour.
        max_image_pixels: largest width x height that is decoded.
        position: mode and stride of the visual positions.
        seed: seed of the run.
        video: how videos are sampled.
        long_samples: see `data.long_samples`.
        max_pack_tiles: most tiles of a sample, which must fit a pack.
        cost: what packs are balanced by.
    """

    text: TextSettings
    tiling: TilingRule
    pad2square: bool
    normalize_type: NormalizeType
    max_image_pixels: int
    position: PositionConfig
    seed: int
    video: VideoRule = DEFAULT_RULE
    long_samples: str = "cut"
    max_pack_tiles: int = 2**62
    cost: PackCost = NO_COST


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of a sample: what random choices depend on, besides the run's seed.

    Attributes:
        epoch: number of the epoch, unique over the run.
        occurrence: 0 for the first time in this epoch, 1 for the second, ...
    """

    epoch: int
    occurrence: int = 0

    def identity(self, sample_id: str) -> str:
        """Name of the draw within its epoch."""
        return sample_id if self.occurrence == 0 else f"{sample_id}#{self.occurrence}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Lengths of one sample, known without its pixels.

    Attributes:
        num_tokens: after the cut at the longest sample.
        num_uncut_tokens: before it.
        num_supervised: supervised tokens.
        num_tiles: tiles of all images.
        sizes: (width, height) of each image.
    """

    num_tokens: int
    num_uncut_tokens: int
    num_supervised: int
    num_tiles: int
    sizes: tuple[Size, ...]


def sample_settings(config: RunConfig, arch: InternVLArchitecture, hf_folder: str | Path) -> SampleSettings:
    """Settings of a run on a checkpoint whose tokenizer lies in `hf_folder`.

    Raises:
        ConfigError: unknown template.
        CheckpointError: the tokenizer cannot be read.
    """
    data = config.data
    return SampleSettings(
        text=TextSettings(
            tokenizer=load_tokenizer(hf_folder),
            template=get_template(data.template or arch.template),
            tokens_per_tile=arch.tokens_per_tile,
            max_tokens=data.max_sample_tokens,
        ),
        tiling=TilingRule(
            image_size=arch.image_size,
            dynamic=data.dynamic_image_size,
            min_tiles=data.min_dynamic_patch,
            max_tiles=data.max_dynamic_patch,
            use_thumbnail=data.use_thumbnail,
            divide_by_images=data.dynamic_max_patch,
        ),
        pad2square=data.pad2square,
        normalize_type=data.normalize_type,
        max_image_pixels=data.max_image_pixels,
        position=config.position,
        seed=config.runtime.seed,
        video=VideoRule(
            min_frames=data.min_num_frame,
            max_frames=data.max_num_frame,
            sampling=data.video_sampling,
            max_seconds=data.max_video_seconds,
        ),
        long_samples=data.long_samples,
        max_pack_tiles=data.max_pack_tiles,
        cost=pack_cost(arch, trains_vision=not config.vision.freeze or config.lora.vision_rank > 0),
    )


def dataset_tiling(settings: SampleSettings, entry: DatasetEntry) -> TilingRule:
    """The run's tiling rule with the data set's own limits."""
    rule = settings.tiling
    if entry.max_dynamic_patch is not None:
        rule = replace(rule, max_tiles=entry.max_dynamic_patch)
    if entry.dynamic_image_size is not None:
        rule = replace(rule, dynamic=entry.dynamic_image_size)
    return rule


def _record_tiling(record: Record, entry: DatasetEntry, settings: SampleSettings) -> TilingRule:
    """The rule for each image of a record; a frame of a video is one tile."""
    rule = rule_for_sample(dataset_tiling(settings, entry), len(record.images))
    return rule if record.video is None else replace(rule, dynamic=False)


def _frame_refs(
    record: Record, count: int, *, settings: SampleSettings, draw: Draw | None
) -> list[FrameRef | None]:
    """Frames of a draw of a video; None for each still image."""
    if record.video is None:
        return [None] * count
    rule = settings.video.of(record.video)
    drawn = draw or Draw(epoch=0)
    places = draw_places(
        rule, count, seed=settings.seed, epoch=drawn.epoch, identity=drawn.identity(record.sample_id)
    )
    frames = FrameDraw(source=record.video, max_seconds=rule.max_seconds, places=places)
    return [FrameRef(draw=frames, number=number) for number in range(count)]


def image_refs(
    record: Record,
    sizes: Sequence[Size],
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    draw: Draw | None = None,
) -> tuple[ImageRef, ...]:
    """How each image of a record is cut; with a draw, also how it is augmented.

    Qualities of the JPEG augmentation are drawn uniformly from 75..100 for every tile, as in the release.
    """
    rule = _record_tiling(record, entry, settings)
    is_padded = settings.pad2square and not rule.dynamic and not entry.data_augment
    pad_color = mean_color(settings.normalize_type) if is_padded else None
    grids = [choose_grid(width, height, rule=rule) for width, height in sizes]
    qualities: list[tuple[int, ...]] = [()] * len(grids)
    if entry.data_augment and draw is not None:
        generator = sample_generator(
            settings.seed, draw.epoch, f"{draw.identity(record.sample_id)}/augmentation"
        )
        qualities = [tuple(generator.integers(75, 101, size=grid.num_tiles).tolist()) for grid in grids]
    frames = _frame_refs(record, len(grids), settings=settings, draw=draw)
    paths = record.images if record.video is None else (record.video.path,) * len(grids)
    return tuple(
        ImageRef(
            path=path,
            size=size,
            grid=grid,
            pad_color=pad_color,
            jpeg_qualities=quality,
            max_pixels=settings.max_image_pixels,
            frame=frame,
        )
        for path, size, grid, quality, frame in zip(paths, sizes, grids, qualities, frames, strict=True)
    )


def encode_draw(
    record: Record,
    sizes: Sequence[Size],
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    draw: Draw,
) -> EncodedSample:
    """Encode one draw of a record whose image sizes are known.

    Raises:
        DataError: see `encode.encode_record`.
    """
    record = with_frames(record, len(sizes))
    strides = image_strides(
        settings.position.mode,
        len(sizes),
        tokens_per_tile=settings.text.tokens_per_tile,
        stride=settings.position.stride or None,
        generator=sample_generator(settings.seed, draw.epoch, draw.identity(record.sample_id)),
    )
    refs = image_refs(record, sizes, entry=entry, settings=settings, draw=draw)
    return encode_record(record, refs=refs, settings=settings.text, strides=strides)


def read_sample(
    line: bytes,
    line_number: int,
    sizes: Sequence[Size],
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
        sizes: (width, height) of each image, of the part that is wanted.
        entry: its data set.
        settings: of the run.
        draw: what random choices depend on.
        units: the part of a long sample that is wanted, see `split`.

    Raises:
        DataError: the line or the sample is not usable, or has changed since it was measured.
    """
    record, _ = part_of(parse_line(line, entry=entry, line_number=line_number), units)
    if record.video is None and len(record.images) != len(sizes):
        raise DataError(
            f"{record.where}: has {len(record.images)} images, but had {len(sizes)} when lengths were measured; "
            "do not change annotation files during a run, and start it again"
        )
    return encode_draw(record, sizes, entry=entry, settings=settings, draw=draw)


def measure_line(
    line: bytes,
    line_number: int,
    *,
    entry: DatasetEntry,
    settings: SampleSettings,
    size_of: Callable[..., Size] = check_image,
) -> Measurement:
    """Lengths of a line, from its text and the headers of its images.

    Args:
        line: as read from the annotation file.
        line_number: 1-based.
        entry: its data set.
        settings: of the run.
        size_of: `images.check_image`, or the same with a memory.

    Raises:
        DataError: the line, one of its images, or the sample is not usable.
    """
    record = parse_line(line, entry=entry, line_number=line_number)
    sizes = record_sizes(record, settings=settings, size_of=size_of)
    return measure_record(record, sizes, entry=entry, settings=settings)


def record_sizes(
    record: Record, *, settings: SampleSettings, size_of: Callable[..., Size] = check_image
) -> tuple[Size, ...]:
    """(width, height) of each image of a record, or of each frame that it will show, from the files' headers.

    Raises:
        DataError: an image or the video is not usable.
    """
    if record.video is not None:
        return measure_video(
            record.video,
            sample_id=record.sample_id,
            rule=settings.video.of(record.video),
            max_pixels=settings.max_image_pixels,
        )
    return tuple(size_of(path, max_pixels=settings.max_image_pixels) for path in record.images)


def measure_record(
    record: Record, sizes: Sequence[Size], *, entry: DatasetEntry, settings: SampleSettings
) -> Measurement:
    """Lengths of a record whose image sizes are known.

    Raises:
        DataError: see `encode.encode_record`.
    """
    record = with_frames(record, len(sizes))
    rule = _record_tiling(record, entry, settings)
    num_tiles = [choose_grid(width, height, rule=rule).num_tiles for width, height in sizes]
    uncut, supervised = conversation_length(record.turns, num_tiles=num_tiles, settings=settings.text)
    num_tokens = uncut
    if uncut > settings.text.max_tokens or not supervised:  # the cut decides, and what is wrong is said there
        refs = image_refs(record, sizes, entry=entry, settings=settings)
        strides = np.full(len(refs), settings.text.tokens_per_tile, dtype=np.int64)
        sample = encode_record(record, refs=refs, settings=settings.text, strides=strides)
        num_tokens, supervised = len(sample.tokens), int((sample.labels != IGNORE_INDEX).sum())
    return Measurement(
        num_tokens=num_tokens,
        num_uncut_tokens=uncut,
        num_supervised=supervised,
        num_tiles=sum(num_tiles),
        sizes=tuple(sizes),
    )
