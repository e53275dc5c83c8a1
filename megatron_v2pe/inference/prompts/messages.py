"""A conversation with images and videos as a prompt, by the template, tokenizer and tiling that training uses.

messages --placeholders, frames of videos--> turns, images --headers--> grids --encode--> Prompt (no pixels yet)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.cut import CutRule
from megatron_v2pe.data.media.image import ImageFile, read_header
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, Medium, MediumTiles
from megatron_v2pe.data.media.tiling import rule_for_sample
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER, VideoFile
from megatron_v2pe.data.samples.records import checked_text, literal_placeholders
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.inference.prompts.prompt import Prompt, prompt_with

_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")


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
        messages: human and gpt in turn, the last one human. Control tokens in them are text, as in training, and a
            placeholder after a backslash is text too.
        settings: template, tokenizer and tiling of the checkpoint.
        stride: position units that a visual token advances.
        system: replaces the template's system text; it has no images.

    Raises:
        ConfigError: the system text has a placeholder, the question is empty, placeholders and attachments differ in
            number, or the prompt is too long.
        DataError: a text has what is no character, or an image or video cannot be read.
    """
    if not messages[-1].text.strip() and not (messages[-1].images or messages[-1].videos):
        raise ConfigError("the question is empty; ask something")
    num_images = sum(len(message.images) for message in messages)
    turns, media = list[Turn](), list[MediumTiles]()
    if system is not None:
        checked_text(system, "the system text", "the question")
        turns.append(Turn(role="system", value=literal_placeholders(system)))
        if _PLACEHOLDER.search(turns[0].value):
            raise ConfigError(
                "the system text has a placeholder of an image; write it as \\<image>, or move it"
            )
    for message in messages:
        text, found = _message_media(message, num_images=num_images, settings=settings)
        turns.append(Turn(role=message.role, value=text))
        media += found
    return prompt_with(turns, media, settings=settings, stride=stride)


def _message_media(
    message: Message, *, num_images: int, settings: SampleSettings
) -> tuple[str, list[MediumTiles]]:
    """The text of a message with one `<image>` for each image and frame, and how each is cut."""
    text = _with_placeholders(message)
    files: dict[str, Iterator[Medium]] = {
        IMAGE_PLACEHOLDER: iter([ImageFile(path=path) for path in message.images]),
        VIDEO_PLACEHOLDER: iter([VideoFile(path=path) for path in message.videos]),
    }
    rule = CutRule(tiling=rule_for_sample(settings.tiling, num_images))
    found: list[MediumTiles] = []

    def expand(match: re.Match[str]) -> str:
        medium = next(files[match.group()])
        headers = medium.probe(settings.media, sample_id=medium.path, header_of=read_header)
        sizes = [header.size for header in headers]
        images = medium.tiles(sizes, rule)
        found.append(MediumTiles(medium=medium, images=images, rules=settings.media))
        return medium.text(len(images)).removesuffix("\n")

    return _PLACEHOLDER.sub(expand, text), found


def _with_placeholders(message: Message) -> str:
    text = literal_placeholders(checked_text(message.text, "its text", "a message"))
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
