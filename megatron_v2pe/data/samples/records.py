"""One line of an annotation file: parsed, checked, its media named. Nothing is opened.

Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}; a text
record has no image, one with several has a list; {"video": "v.mp4", "clip": [3, 9.5]} has frames instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import Size
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, Medium
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER, VideoFile
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import resolve_path
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked conversation.

    Attributes:
        sample_id: `data set:line`, the sample's identity in logs, plans and random draws.
        where: `file:line`, for messages.
        turns: human and gpt in turn, human first, with one placeholder for each medium.
        media: in order of their placeholders.
        system: system prompt of the record's own; empty takes the template's.
    """

    sample_id: str
    where: str
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]
    system: str = ""

    @property
    def messages(self) -> tuple[Turn, ...]:
        """The turns, after the record's own system prompt where it has one."""
        own = (Turn(role="system", value=self.system),) if self.system else ()
        return (*own, *self.turns)


def sizes_by_medium(record: Record, sizes: Sequence[Size]) -> list[Sequence[Size]]:
    """Sizes of all images of a record, medium by medium.

    Raises:
        DataError: the record does not have so many images.
    """
    known = sum(medium.num_images or 0 for medium in record.media)
    num_open = sum(medium.num_images is None for medium in record.media)
    if num_open > 1 or len(sizes) < known or (len(sizes) > known and not num_open):
        raise DataError(
            f"{record.where}: has {known} images, but had {len(sizes)} when lengths were measured; "
            "do not change annotation files during a run, and start it again"
        )
    found: list[Sequence[Size]] = []
    start = 0
    for medium in record.media:
        end = start + (len(sizes) - known if medium.num_images is None else medium.num_images)
        found.append(sizes[start:end])
        start = end
    return found


def write_images(record: Record, sizes: Sequence[Size]) -> Record:
    """The record with one `<image>` for each image of its media.

    Args:
        record: see `parse_line`.
        sizes: (width, height) of each image.

    Raises:
        DataError: see `sizes_by_medium`.
    """
    turns = record.turns
    for medium, own in zip(record.media, sizes_by_medium(record, sizes), strict=True):
        if medium.placeholder != IMAGE_PLACEHOLDER:
            turns = _replace_first(turns, medium.placeholder, medium.text(len(own)))
    return record if turns is record.turns else replace(record, turns=turns)


def _replace_first(turns: Sequence[Turn], placeholder: str, text: str) -> tuple[Turn, ...]:
    """Turns with the first `placeholder` replaced; a line break after it belongs to it."""
    changed = list(turns)
    for index, turn in enumerate(turns):
        before, found, after = turn.value.partition(placeholder)
        if found:
            changed[index] = Turn(role=turn.role, value=before + text + after.removeprefix("\n"))
            break
    return tuple(changed)


def parse_line(line: bytes, *, entry: DatasetEntry, line_number: int) -> Record:
    """Parse one line of an annotation file.

    Args:
        line: the line as read, utf-8.
        entry: its data set.
        line_number: 1-based.

    Raises:
        DataError: `file:line: ...`, for anything that is not a usable text, image or video record.
    """
    where = f"{entry.annotation}:{line_number}"
    try:
        values = json.loads(line.decode("utf-8-sig"))  # some editors mark the start of a file
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not utf-8 ({error})") from None
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise DataError(f"{where}: not valid json ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a json object, found {type(values).__name__}")
    return parse_record(values, entry=entry, sample_id=f"{entry.name}:{line_number}", where=where)


def parse_record(values: dict[str, Any], *, entry: DatasetEntry, sample_id: str, where: str) -> Record:
    """Check one record; see `parse_line`."""
    images = _parse_images(values, entry, where)
    video = _parse_video(values, entry, where)
    system, turns = _parse_turns(values.get("conversations"), where)
    if video is not None:
        turns = _place_video(turns, where)
    num_placeholders = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    # The release puts a missing placeholder in front of a single image's conversation. It checks the first
    # message only and would leave a placeholder of a later message as plain text.
    if num_placeholders == 0 and isinstance(values.get("image"), str) and images:
        turns, num_placeholders = _with_first_line(turns, IMAGE_PLACEHOLDER), 1
    if num_placeholders != len(images):
        raise DataError(
            f"{where}: {num_placeholders} times {IMAGE_PLACEHOLDER} for {len(images)} images; each image needs "
            "exactly one placeholder"
        )
    media = images if video is None else (video,)
    return Record(sample_id=sample_id, where=where, turns=turns, media=media, system=system)


def _with_first_line(turns: tuple[Turn, ...], line: str) -> tuple[Turn, ...]:
    return (Turn(role=turns[0].role, value=f"{line}\n{turns[0].value}"), *turns[1:])


def _parse_images(values: dict[str, Any], entry: DatasetEntry, where: str) -> tuple[Medium, ...]:
    image = values.get("image")
    if not image:
        return ()
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: image must be a path or a list of paths, found {image!r}")
    for name in names:
        _check_text(name, "image", where)
    root = entry.root2 if isinstance(image, list) and entry.root2 else entry.root
    return tuple(ImageFile(path=_image_path(name, root, entry, where)) for name in names)


def _parse_video(values: dict[str, Any], entry: DatasetEntry, where: str) -> VideoFile | None:
    name = values.get("video")
    if not name:
        return None
    if values.get("image"):
        raise DataError(f"{where}: has an image and a video; make two records of it")
    if not isinstance(name, str):
        raise DataError(f"{where}: video must be one path, found {name!r}")
    _check_text(name, "video", where)
    path = resolve_path(entry.root, name, where=where, kind="video")
    clip = values.get("clip")
    if clip is not None:
        is_pair = isinstance(clip, list) and len(clip) == 2 and all(_is_second(second) for second in clip)
        if not is_pair or not clip[0] < clip[1]:
            raise DataError(
                f"{where}: clip must be [start, end] in seconds with 0 <= start < end, found {clip!r}"
            )
        clip = (float(clip[0]), float(clip[1]))
    # A slash at the end says that the video is a folder of frames; normalised paths have lost it.
    return VideoFile(
        path=path.rstrip("/") + ("/" if name.endswith("/") else ""),
        clip=clip,
        fps=entry.video_fps,
        min_frames=entry.min_num_frame,
        max_frames=entry.max_num_frame,
    )


def _is_second(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


def _place_video(turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """Exactly one `<video>`; a missing one goes in front of the first message, as in the release."""
    count = sum(turn.value.count(VIDEO_PLACEHOLDER) for turn in turns)
    if count > 1:
        raise DataError(
            f"{where}: {count} times {VIDEO_PLACEHOLDER}, but a record has one video; keep one of them"
        )
    if count == 1:
        return turns
    return _with_first_line(turns, VIDEO_PLACEHOLDER)


def _image_path(name: str, root: str, entry: DatasetEntry, where: str) -> str:
    """Web addresses are files named by their hash below `http_root`, as in the release."""
    if entry.http_root and name.lower().startswith("http"):
        return entry.http_root + hashlib.sha256(name.encode()).hexdigest()
    return resolve_path(root, name, where=where)


def _parse_turns(conversations: Any, where: str) -> tuple[str, tuple[Turn, ...]]:
    """The system prompt, empty where the record has none, and the turns."""
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: conversations must be a list of at least one message")
    turns = [_parse_turn(message, index, where) for index, message in enumerate(conversations)]
    system = ""
    if turns[0].role == "system":
        system, turns = turns[0].value, turns[1:]
        if IMAGE_PLACEHOLDER in system or VIDEO_PLACEHOLDER in system:
            raise DataError(
                f"{where}: conversations[0] is a system prompt with an image; move it to a human message"
            )
    if turns and turns[0].role == "gpt":  # an opening of the assistant is dropped, as in the release
        turns = turns[1:]
    if not turns:
        raise DataError(f"{where}: conversations have no human message")
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(f"{where}: messages must alternate human, gpt, ...; two of {turn.role!r} follow")
    return system, tuple(turns)


def _parse_turn(message: Any, index: int, where: str) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise DataError(f"{where}: conversations[{index}] must be an object with 'from' and a text 'value'")
    role = message.get("from")
    if role not in ("human", "gpt") and not (role == "system" and index == 0):
        raise DataError(
            f"{where}: conversations[{index}].from is {role!r}, but must be 'human' or 'gpt', or 'system' in the first"
        )
    value = message["value"]
    _check_text(value, f"conversations[{index}]", where)
    for token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT):
        if token in value:
            raise DataError(
                f"{where}: conversations[{index}] contains the reserved token {token}; images are marked by "
                f"{IMAGE_PLACEHOLDER}"
            )
    return Turn(role=role, value=value)


def _check_text(text: str, what: str, where: str) -> None:
    """Refuse half a surrogate pair: an escape of json can spell it, but no file name, tokenizer or log can hold it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: {what} has {half!r} at character {error.start + 1}, half of a surrogate pair, which is no "
            "character; write both halves, or remove it"
        ) from None
