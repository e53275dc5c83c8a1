"""One line of an annotation file: parsed, checked, paths resolved. Nothing is opened.

Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}; a text
record has no image, one with several has a list; {"video": "v.mp4", "clip": [3, 9.5]} has frames instead.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.frames import VideoSource, frame_lines
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import resolve_path
from megatron_v2pe.data.text.templates import Turn
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked conversation.

    Attributes:
        sample_id: `data set:line`, the sample's identity in logs, plans and random draws.
        where: `file:line`, for messages.
        turns: human and gpt in turn, human first; as many placeholders in all as there are images.
        images: paths, in order of their placeholders.
        video: instead of images; the turns then hold one `<video>`, see `with_frames`.
    """

    sample_id: str
    where: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    video: VideoSource | None = None


def with_frames(record: Record, count: int) -> Record:
    """The record with one placeholder for each of `count` frames, if it has a video.

    The lines are those of the release's evaluation, `Frame1: <image>` and a line break each; its training code
    wrote `Frame1:<image>` and no break before the question (its defect D23).
    """
    if record.video is None:
        return record
    turns = list(record.turns)
    for index, turn in enumerate(turns):
        before, found, after = turn.value.partition(VIDEO_PLACEHOLDER)
        if found:
            value = before + frame_lines(count) + after.removeprefix("\n")
            turns[index] = Turn(role=turn.role, value=value)
    return replace(record, turns=tuple(turns))


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
    turns = _parse_turns(values.get("conversations"), where)
    if video is not None:
        turns = _place_video(turns, where)
    num_placeholders = sum(turn.value.count(IMAGE_PLACEHOLDER) for turn in turns)
    # The release puts a missing placeholder in front of a single image's conversation. It looks at the first
    # message only and would leave a placeholder of a later message as plain text.
    if num_placeholders == 0 and isinstance(values.get("image"), str) and images:
        first = Turn(role=turns[0].role, value=f"{IMAGE_PLACEHOLDER}\n{turns[0].value}")
        turns, num_placeholders = (first, *turns[1:]), 1
    if num_placeholders != len(images):
        raise DataError(
            f"{where}: {num_placeholders} times {IMAGE_PLACEHOLDER} for {len(images)} images; each image needs "
            "exactly one placeholder"
        )
    return Record(sample_id=sample_id, where=where, turns=turns, images=images, video=video)


def _parse_images(values: dict[str, Any], entry: DatasetEntry, where: str) -> tuple[str, ...]:
    image = values.get("image")
    if not image:
        return ()
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: image must be a path or a list of paths, found {image!r}")
    for name in names:
        _check_text(name, "image", where)
    root = entry.root2 if isinstance(image, list) and entry.root2 else entry.root
    return tuple(_image_path(name, root, entry, where) for name in names)


def _parse_video(values: dict[str, Any], entry: DatasetEntry, where: str) -> VideoSource | None:
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
    return VideoSource(
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
    return (Turn(role=turns[0].role, value=f"{VIDEO_PLACEHOLDER}\n{turns[0].value}"), *turns[1:])


def _image_path(name: str, root: str, entry: DatasetEntry, where: str) -> str:
    """Web addresses are files named by their hash below `http_root`, as in the release."""
    if entry.http_root and name.lower().startswith("http"):
        return entry.http_root + hashlib.sha256(name.encode()).hexdigest()
    return resolve_path(root, name, where=where)


def _parse_turns(conversations: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: conversations must be a list of at least one message")
    turns = [_parse_turn(message, index, where) for index, message in enumerate(conversations)]
    if turns[0].role != "human":  # an opening of the assistant is dropped, as in the release
        turns = turns[1:]
    if not turns:
        raise DataError(f"{where}: conversations have no human message")
    for index, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[index % 2]:
            raise DataError(f"{where}: messages must alternate human, gpt, ...; two of {turn.role!r} follow")
    return tuple(turns)


def _parse_turn(message: Any, index: int, where: str) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise DataError(f"{where}: conversations[{index}] must be an object with 'from' and a text 'value'")
    role = message.get("from")
    if role not in ("human", "gpt"):
        raise DataError(f"{where}: conversations[{index}].from is {role!r}, but must be 'human' or 'gpt'")
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
