"""The settings of a run that decide what a line of an annotation file becomes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import PositionConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.media.frames import VideoRule
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, MediaRules
from megatron_v2pe.data.media.normalization import NormalizeType
from megatron_v2pe.data.media.tiling import TilingRule
from megatron_v2pe.data.samples.cost import NO_COST, PackCost, pack_cost
from megatron_v2pe.data.samples.encode import TextSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.text.agreement import chosen_template, require_rows
from megatron_v2pe.data.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Everything that decides what a line becomes.

    Attributes:
        text: tokenizer, template, longest sample.
        tiling: rule of the run; a data set may override parts of it.
        pad2square: pad an image that is not tiled and not augmented.
        normalize_type: its mean is the padding color.
        position: mode and stride of the visual positions.
        seed: seed of the run.
        media: how pictures and videos are read.
        long_samples: see `data.long_samples`.
        max_pack_tiles: most tiles of a sample, which must fit a pack.
        cost: what packs are balanced by.
        smaller_sizes: pixels of a tile's side in the smaller branches of a pyramid (PIIP).
    """

    text: TextSettings
    tiling: TilingRule
    pad2square: bool
    normalize_type: NormalizeType
    position: PositionConfig
    seed: int
    media: MediaRules = field(default_factory=MediaRules)
    long_samples: str = "cut"
    max_pack_tiles: int = 2**62
    cost: PackCost = NO_COST
    smaller_sizes: tuple[int, ...] = ()


def sample_settings(config: RunConfig, arch: InternVLArchitecture, hf_folder: str | Path) -> SampleSettings:
    """Settings of a run on a checkpoint whose tokenizer lies in `hf_folder`.

    Raises:
        ConfigError: a template that is unknown, or does not fit the tokenizer.
        CheckpointError: the tokenizer cannot be read, or does not fit the embedding.
    """
    data = config.data
    tokenizer = load_tokenizer(hf_folder)
    require_rows(
        tokenizer,
        num_rows=arch.language.vocab_size,
        folder=hf_folder,
        image_token_id=arch.image_token_id,
    )
    template = chosen_template(data.template, arch.template, tokenizer=tokenizer, folder=hf_folder)
    if arch.system_message:
        template = template.with_system(arch.system_message)
    return SampleSettings(
        text=TextSettings(
            tokenizer=tokenizer,
            template=template,
            tokens_per_tile=arch.tokens_per_tile,
            max_tokens=data.max_sample_tokens,
            control_tokens=data.control_tokens,
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
        position=config.position,
        seed=config.runtime.seed,
        media=MediaRules(
            max_pixels=data.max_image_pixels,
            exif=data.exif,
            alpha=data.alpha,
            video=VideoRule(
                min_frames=data.min_num_frame,
                max_frames=data.max_num_frame,
                sampling=data.video_sampling,
                max_seconds=data.max_video_seconds,
            ),
        ),
        long_samples=data.long_samples,
        max_pack_tiles=data.max_pack_tiles,
        smaller_sizes=arch.tile_sizes[1:],
        cost=pack_cost(arch, trains_vision=not config.vision.freeze or config.lora.vision_rank > 0),
    )


def with_system(settings: SampleSettings, system: str | None) -> SampleSettings:
    """The settings with a system text that the user named; it is reported where the checkpoint's is another one.

    Raises:
        ConfigError: it holds a placeholder of an image.
    """
    if system is None:
        return settings
    if any(placeholder in system for placeholder in (IMAGE_PLACEHOLDER, "<video>")):
        raise ConfigError(
            f"--system is {system!r}, but a system text has no images; move them to the question"
        )
    template = settings.text.template.with_system(system)
    own = settings.text.template.system_text
    if template.system_text != own:
        logger.warning(
            "--system is not the system text that this checkpoint was trained with (%s); omit it to use that",
            shortened(own),
        )
    return replace(settings, text=replace(settings.text, template=template))


def dataset_tiling(settings: SampleSettings, entry: DatasetEntry) -> TilingRule:
    """The run's tiling rule with the data set's own limits."""
    rule = settings.tiling
    if entry.max_dynamic_patch is not None:
        rule = replace(rule, max_tiles=entry.max_dynamic_patch)
    if entry.dynamic_image_size is not None:
        rule = replace(rule, dynamic=entry.dynamic_image_size)
    return rule
