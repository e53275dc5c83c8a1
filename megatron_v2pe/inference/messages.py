"""A conversation with images and videos as a prompt, by the template, tokenizer and tiling that training uses.

messages --placeholders, frames of videos--> turns, images --headers--> grids --encode--> Prompt (no pixels yet)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.frames import FrameDraw, FrameRef, VideoSource, draw_places, frame_lines
from megatron_v2pe.data.media.images import ImageRef, check_image
from megatron_v2pe.data.media.pixels import measure_video
from megatron_v2pe.data.media.tiling import choose_grid, rule_for_sample
from megatron_v2pe.data.samples.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megatron_v2pe.data.samples.sample_maker import SampleSettings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from megatron_v2pe.inference.prompt import Prompt, prompt_with

_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")
_RESERVED = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message and what is attached to it.

    Attributes:
        role: who speaks.
        text: with a placeholder `<image>` or `<video>` where each attachment belongs; without any, they come first.
        images: files.
        videos: files or folders of frames.
    """

    role: Literal["human", "gpt"]
    text: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()


def build_prompt(
    messages: Sequence[Message], *, settings: SampleSettings, stride: int, system: str | None = None
) -> Prompt:
    """Encode a conversation that ends with a question. Of images and videos the headers are read.

    Args:
        messages: human and gpt in turn, the last one human.
        settings: template, tokenizer and tiling of the checkpoint.
        stride: position units that a visual token advances.
        system: replaces the template's system text.

    Raises:
        ConfigError: the question is empty, placeholders and attachments differ in number, a message has a reserved
            token, or the prompt is too long.
        DataError: an image or video cannot be read.
    """
    if not messages[-1].text.strip() and not (messages[-1].images or messages[-1].videos):
        raise ConfigError("the question is empty; ask something")
    num_images = sum(len(message.images) for message in messages)
    turns, refs = [], []
    for message in messages:
        text, found = _message_refs(message, num_images=num_images, settings=settings)
        turns.append(Turn(role=message.role, value=text))
        refs += found
    if system is not None:
        template = settings.text.template
        opening = template.system[: template.system.index("\n") + 1]
        template = replace(template, system=opening + system)
        settings = replace(settings, text=replace(settings.text, template=template))
    return prompt_with(turns, refs, settings=settings, stride=stride)


def _message_refs(
    message: Message, *, num_images: int, settings: SampleSettings
) -> tuple[str, list[ImageRef]]:
    """The text of a message with one `<image>` for each image and frame, and how each is cut."""
    for token in _RESERVED:
        if token in message.text:
            raise ConfigError(
                f"the text contains the reserved token {token}; images are marked by {IMAGE_PLACEHOLDER}"
            )
    text = _with_placeholders(message)
    images, videos = iter(message.images), iter(message.videos)
    refs: list[ImageRef] = []

    def expand(match: re.Match[str]) -> str:
        if match.group() == IMAGE_PLACEHOLDER:
            refs.append(_image_ref(next(images), num_images=num_images, settings=settings))
            return IMAGE_PLACEHOLDER
        frames = _video_refs(next(videos), settings=settings)
        refs.extend(frames)
        return frame_lines(len(frames)).removesuffix("\n")

    return _PLACEHOLDER.sub(expand, text), refs


def _with_placeholders(message: Message) -> str:
    text = message.text
    wanted = ((IMAGE_PLACEHOLDER, message.images), (VIDEO_PLACEHOLDER, message.videos))
    for placeholder, attached in reversed(wanted):
        count = text.count(placeholder)
        if count == 0 and attached:
            text = f"{placeholder}\n" * len(attached) + text
        elif count != len(attached):
            what = "images" if placeholder == IMAGE_PLACEHOLDER else "videos"
            raise ConfigError(
                f"the text has {count} {placeholder} for {len(attached)} {what}; give one for each, or none to have "
                "them put first"
            )
    return text


def _image_ref(path: str, *, num_images: int, settings: SampleSettings) -> ImageRef:
    size = check_image(path, max_pixels=settings.max_image_pixels)
    grid = choose_grid(*size, rule=rule_for_sample(settings.tiling, num_images))
    return ImageRef(path=path, size=size, grid=grid, max_pixels=settings.max_image_pixels)


def _video_refs(path: str, *, settings: SampleSettings) -> list[ImageRef]:
    """The middle frames of equal intervals, as many as training shows at most, one tile each."""
    rule = replace(settings.video, min_frames=settings.video.max_frames, sampling="middle")
    source = VideoSource(path=path)
    sizes = measure_video(source, sample_id=path, rule=rule, max_pixels=settings.max_image_pixels)
    places = draw_places(rule, len(sizes), seed=0, epoch=0, identity=path)
    draw = FrameDraw(source=source, max_seconds=rule.max_seconds, places=places)
    tiling = replace(settings.tiling, dynamic=False)
    return [
        ImageRef(
            path=path,
            size=size,
            grid=choose_grid(*size, rule=tiling),
            max_pixels=settings.max_image_pixels,
            frame=FrameRef(draw=draw, number=number),
        )
        for number, size in enumerate(sizes)
    ]
