r"""One line of an annotation file: parsed, checked, its media named. Nothing is opened.

    line --json--> object --formats.to_native--> messages, images, videos --checked--> Record

Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}; a text
record has no image, one with several has a list; {"video": "v.mp4", "clip": [3, 9.5]} has frames instead. Other formats
are in `formats`. A placeholder that is meant as text is written with a backslash: `\<image>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.media.cut import Size
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, LITERAL_MARK, Medium
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER, VideoFile
from megatron_v2pe.data.samples.formats import HINT, OPENING_NOTE, NativeRecord, system_note, to_native
from megatron_v2pe.data.samples.messages import Message
from megatron_v2pe.data.sources.file_kinds import HEAD_BYTES, annotation_kind, way_out
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import resolve_path
from megatron_v2pe.data.text.templates import Role, Turn

MediaSizes = Sequence[Sequence[Size]]
"""(width, height) of the images of each medium of a record, in order."""
_PLACEHOLDERS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
_MOST_NAME = 4096  # characters of a path
# Placeholders of other programs, and ours in another spelling.
_FOREIGN = re.compile(
    r"(?i)<\|?\s*(?:image|video)(?:[_ ]?(?:pad|token|placeholder|soft_token|here))?[_ ]?\d*\s*\|?>"
    r"|\[(?:image|img|video)\]"
)
# A picture within the text, as Qwen-VL writes it.
_NAMED_IN_TEXT = re.compile(r"(?i)<img>[^<>\n]{1,400}\.(?:png|jpe?g|webp|gif|bmp|tiff?|avif)</img>")
# How PNG, JPEG, GIF and WebP files begin in base64.
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{40,}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked conversation.

    Attributes:
        sample_id: `data set:line`, the sample's identity in logs, plans and random draws.
        where: `file:line`, for messages.
        turns: human and gpt in turn, human first, with functions' messages between; or a single one of `pretrain`; one
            placeholder for each medium.
        media: in order of their placeholders.
        system: system prompt of the record's own; empty uses the template's.
        notes: what was understood under another name, and what is not read; see `formats.note_text`.
    """

    sample_id: str
    where: str
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]
    system: str = ""
    notes: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[Turn, ...]:
        """The turns, after the record's own system prompt where it has one."""
        own = (Turn(role="system", value=self.system),) if self.system else ()
        return (*own, *self.turns)


def check_sizes(record: Record, sizes: MediaSizes) -> MediaSizes:
    """The sizes, if they fit the record.

    Raises:
        DataError: the record does not have so many media, or one of them not so many images.
    """
    declared = [medium.num_images for medium in record.media]
    found = [len(own) for own in sizes]
    if len(found) != len(declared) or any(
        known is not None and known != count for known, count in zip(declared, found, strict=True)
    ):
        raise DataError(
            f"{record.where}: has {len(declared)} images and videos, but had {len(found)} when lengths were measured; "
            "do not change annotation files during a run, and start it again"
        )
    return sizes


def write_images(record: Record, sizes: MediaSizes) -> Record:
    """The record with one `<image>` for each image of its media.

    Args:
        record: see `parse_line`.
        sizes: (width, height) of each image of each medium.

    Raises:
        DataError: see `check_sizes`.
    """
    turns = record.turns
    for medium, own in zip(record.media, check_sizes(record, sizes), strict=True):
        if medium.placeholder != IMAGE_PLACEHOLDER:
            turns = _replace_first(turns, medium.placeholder, medium.text(len(own)))
    return record if turns is record.turns else replace(record, turns=turns)


def _replace_first(turns: Sequence[Turn], placeholder: str, text: str) -> tuple[Turn, ...]:
    """Turns with the first `placeholder` replaced; a line break after it belongs to it."""
    changed = list(turns)
    for index, turn in enumerate(turns):
        before, found, after = turn.value.partition(placeholder)
        if found:
            changed[index] = replace(turn, value=before + text + after.removeprefix("\n"))
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
        text = line.decode("utf-8-sig")  # some editors mark the start of a file
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not utf-8 ({error})") from None
    except _RepeatedKeyError as error:
        raise DataError(f"{where}: key {error} is there twice; keep one") from None
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise DataError(f"{where}: not valid json ({_json_problem(line, error)})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a json object, found {type(values).__name__}")
    return parse_record(values, entry=entry, sample_id=f"{entry.name}:{line_number}", where=where)


class _RepeatedKeyError(Exception):
    """A key that an object has twice, of which json would keep the last."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(shortened(next(name for name in names if names.count(name) > 1), 40))
    return values


def _json_problem(line: bytes, error: Exception) -> str:
    """What is wrong, and what the line is if not json."""
    kind = annotation_kind(line[:HEAD_BYTES])
    return f"it is {kind}; {way_out(kind)}" if kind else " ".join(str(error).split())[:200]


def parse_record(values: dict[str, Any], *, entry: DatasetEntry, sample_id: str, where: str) -> Record:
    """Check one record; see `parse_line`."""
    native = to_native(values, format_name=entry.format, where=where)
    native = _with_image_names(native, where)
    images = _parse_images(native.image, entry, where)
    videos = _parse_videos(native, entry, where)
    turns = _parse_turns(native.messages, where)
    is_plain = turns[0].role == "pretrain"
    notes = list(native.notes)
    if native.messages[0].role == "gpt":
        notes.append(OPENING_NOTE)
    own_system = checked_text(native.system, "system text", where)
    if is_plain and own_system:
        raise DataError(f"{where}: a text from 'pretrain' has no system text; remove it, or write turns")
    system = "" if is_plain else own_system or entry.system
    if any(placeholder in system for placeholder in _PLACEHOLDERS):
        raise DataError(f"{where}: the system text has a placeholder of an image; move it to a human message")
    if native.has_video_image and videos and not images and _stands_for_videos(turns, len(videos)):
        turns = _renamed(turns, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
        notes.append("video_image")
    is_single = isinstance(values.get("image"), str) or ("alias:images=image" in notes and len(images) == 1)
    turns = _placed(turns, IMAGE_PLACEHOLDER, images, where=where, may_add=is_single)
    turns = _placed(turns, VIDEO_PLACEHOLDER, videos, where=where, may_add=len(videos) == 1)
    if own_system.strip():
        notes.append(system_note(own_system))
    return Record(
        sample_id=sample_id,
        where=where,
        turns=turns,
        media=_in_order(turns, images, videos),
        system=system,
        notes=tuple(notes),
    )


def _stands_for_videos(turns: Sequence[Turn], num_videos: int) -> bool:
    texts = [turn.value for turn in turns]
    has_video = any(VIDEO_PLACEHOLDER in text for text in texts)
    return not has_video and sum(text.count(IMAGE_PLACEHOLDER) for text in texts) == num_videos


def _renamed(turns: Sequence[Turn], old: str, new: str) -> tuple[Turn, ...]:
    return tuple(replace(turn, value=turn.value.replace(old, new)) for turn in turns)


def _placed(
    turns: tuple[Turn, ...], placeholder: str, media: Sequence[Medium], *, where: str, may_add: bool
) -> tuple[Turn, ...]:
    """Turns with exactly one placeholder for each medium; a single one that has none gets it in front.

    The release puts a missing placeholder in front of the conversation. It checks the first message only and would
    leave a placeholder of a later message as plain text.
    """
    count = sum(turn.value.count(placeholder) for turn in turns)
    foreign = _foreign_placeholder(turns) if count < len(media) else ""
    if count == 0 and may_add and media and not foreign:
        turns = (replace(turns[0], value=f"{placeholder}\n{turns[0].value}"), *turns[1:])
        count = 1
    if count != len(media):
        kind = placeholder[1:-1]
        raise DataError(
            f"{where}: {count} times {placeholder} for {len(media)} {kind}s; each {kind} needs exactly one "
            f"placeholder, and \\{placeholder} is the text itself" + foreign
        )
    return turns


def _foreign_placeholder(turns: Sequence[Turn]) -> str:
    """A sentence about what may be meant as a placeholder; empty where nothing is."""
    spelled = (found.group() for turn in turns for found in _FOREIGN.finditer(turn.value))
    found = next((text for text in spelled if text not in _PLACEHOLDERS), "")
    return f"; the text has {shortened(found)}: is one of {', '.join(_PLACEHOLDERS)} meant?" if found else ""


def _in_order(
    turns: Sequence[Turn], images: Sequence[Medium], videos: Sequence[Medium]
) -> tuple[Medium, ...]:
    """Media in the order of their placeholders."""
    if not videos or not images:
        return tuple(images or videos)
    waiting = {IMAGE_PLACEHOLDER: iter(images), VIDEO_PLACEHOLDER: iter(videos)}
    pattern = re.compile("|".join(_PLACEHOLDERS))
    return tuple(next(waiting[found]) for turn in turns for found in pattern.findall(turn.value))


def _with_image_names(native: NativeRecord, where: str) -> NativeRecord:
    """`{"<image_00>": "a.png"}` (MiniCPM-V): names of placeholders and their files, as a list of images."""
    names = native.image
    if not isinstance(names, dict):
        return native
    if not all(isinstance(name, str) and name.startswith("<") and name.endswith(">") for name in names):
        raise DataError(f"{where}: image must be a path or a list of paths, found {shortened(names)}; {HINT}")
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    files: list[Any] = []

    def placeholder(found: re.Match[str]) -> str:
        files.append(names[found.group()])
        return IMAGE_PLACEHOLDER

    messages = [replace(each, text=pattern.sub(placeholder, each.text)) for each in native.messages]
    if len(files) != len(names):
        raise DataError(
            f"{where}: image names {len(names)} placeholders, but the messages have {len(files)} of them; each needs "
            "exactly one"
        )
    return replace(native, messages=messages, image=files, notes=(*native.notes, "alias:image{}=image"))


def _parse_images(image: Any, entry: DatasetEntry, where: str) -> tuple[Medium, ...]:
    if not image:
        return ()
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        found = _embedded_text(names) or shortened(image)
        raise DataError(f"{where}: image must be a path or a list of paths, found {found}")
    root = entry.root2 if isinstance(image, list) and entry.root2 else entry.root
    return tuple(
        ImageFile(path=_image_path(_checked_name(name, "image", where), root, entry, where)) for name in names
    )


def _embedded_text(names: Any) -> str:
    """What a list of images holds if it holds the images themselves, as parquet files of data sets do."""
    first = names[0] if isinstance(names, list) and names else names
    if isinstance(first, dict) and ("bytes" in first or "path" in first):
        return "an image inside the record; `convert-data --media FOLDER` writes such images to files"
    return ""


def _checked_name(name: str, kind: str, where: str) -> str:
    """A name that can be a file's.

    Raises:
        DataError: it holds the file itself, is too long for a name, or is no text that can be written.
    """
    if name[:5].lower() == "data:":
        raise DataError(
            f"{where}: {kind} is a data: address ({len(name):,} characters), not a file; write it to a file below the "
            "root (`convert-data --media FOLDER` does)"
        )
    if name[:1] == "[" and name[-1:] == "]":
        raise DataError(
            f"{where}: {kind} is {shortened(name)}, a list written as a text; write the list itself"
        )
    if len(name) > _MOST_NAME or is_base64_image(name):
        raise DataError(
            f"{where}: {kind} has {len(name):,} characters and is no path; is it the file itself as base64? "
            "Write it to a file below the root (`convert-data --media FOLDER` does)"
        )
    return checked_text(name, kind, where)


def _parse_videos(native: NativeRecord, entry: DatasetEntry, where: str) -> tuple[Medium, ...]:
    names = native.videos
    if not all(isinstance(name, (str, list)) and name for name in names):
        raise DataError(f"{where}: video must be a path or a list of paths, found {shortened(names)}")
    if any(isinstance(name, list) for name in names):
        raise DataError(
            f"{where}: a video is a list of frames; give the folder that holds them, with a slash at its end"
        )
    clip = _parse_clip(native.clip, where)
    if clip is not None and len(names) != 1:
        raise DataError(f"{where}: has a clip and {len(names)} videos, but a clip belongs to a single one")
    return tuple(_video_file(name, clip, entry, where) for name in names)


def _parse_clip(clip: Any, where: str) -> tuple[float, float] | None:
    if clip is None:
        return None
    is_pair = isinstance(clip, list) and len(clip) == 2 and all(_is_second(second) for second in clip)
    if not is_pair or not clip[0] < clip[1]:
        raise DataError(
            f"{where}: clip must be [start, end] in seconds with 0 <= start < end, found {shortened(clip)}"
        )
    return float(clip[0]), float(clip[1])


def _video_file(name: str, clip: tuple[float, float] | None, entry: DatasetEntry, where: str) -> VideoFile:
    path = resolve_path(entry.root, _checked_name(name, "video", where), where=where, kind="video")
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


def _image_path(name: str, root: str, entry: DatasetEntry, where: str) -> str:
    """Web addresses are files named by their hash below `http_root`, as in the release."""
    if entry.http_root and name.lower().startswith("http"):
        return entry.http_root + hashlib.sha256(name.encode()).hexdigest()
    return resolve_path(root, name, where=where)


def _parse_turns(messages: Sequence[Message], where: str) -> tuple[Turn, ...]:
    turns = [_parse_turn(message) for message in messages]
    if turns and turns[0].role == "gpt":  # an opening of the assistant is dropped, as in the release
        turns = turns[1:]
    if not turns:
        raise DataError(f"{where}: conversations have no human message")
    if any(turn.role == "pretrain" for turn in turns):
        if len(turns) > 1:
            raise DataError(
                f"{where}: a message from 'pretrain' is a text of its own, but this record has {len(turns)}"
            )
        return tuple(turns)
    for index, turn in enumerate(turns):
        if turn.role == "system":
            raise DataError(f"{where}: a message from 'system' is not the first; only the first may be")
        before = turns[index - 1].role if index else "gpt"
        if before not in _AFTER[turn.role]:
            what = (
                f"two of {turn.role!r} follow" if before == turn.role else f"{turn.role!r} follows {before!r}"
            )
            raise DataError(
                f"{where}: messages must alternate human, gpt, ..., functions before an answer; {what}"
            )
    if turns[0].role == "tool" or turns[-1].role == "tool":
        raise DataError(
            f"{where}: the first or last message is from a function; it belongs between a question and its answer"
        )
    return tuple(turns)


_AFTER: dict[Role, tuple[Role, ...]] = {
    "human": ("gpt",),
    "gpt": ("human", "tool"),
    "tool": ("human", "gpt", "tool"),
}
"""Role of a message -> roles that the one before it may have."""


def _parse_turn(message: Message) -> Turn:
    value = checked_text(message.text, "its text", message.where)
    named = _NAMED_IN_TEXT.search(value) if message.role == "human" else None
    if named:
        raise DataError(
            f"{message.where}: the text names a file in {shortened(named.group())}, as Qwen-VL writes pictures; write "
            "<image> there, and the file as 'image' of the record"
        )
    return Turn(role=message.role, value=literal_placeholders(value), supervised=message.supervised)


def literal_placeholders(text: str) -> str:
    r"""A text whose `\<image>` and `\<video>` are no placeholders; see `medium.plain_text` for the way back."""
    if "\\<" not in text:
        return text
    for placeholder in _PLACEHOLDERS:
        text = text.replace("\\" + placeholder, placeholder[0] + LITERAL_MARK + placeholder[1:])
    return text


def is_base64_image(name: str) -> bool:
    """Whether a name of a file is the file itself, a picture as base64."""
    return _BASE64.fullmatch(name) is not None


def checked_text(text: str, what: str, where: str) -> str:
    """The text, if it is one.

    Raises:
        DataError: it has half a surrogate pair, which an escape of json can spell, but no file name, tokenizer or log
            can hold; or the mark of literal placeholders.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{where}: {what} has {half!r} at character {error.start + 1}, half of a surrogate pair, which is no "
            "character; write both halves, or remove it"
        ) from None
    if LITERAL_MARK in text:
        raise DataError(
            f"{where}: {what} has {LITERAL_MARK!r} at character {text.index(LITERAL_MARK) + 1}, which Unicode keeps "
            "out of texts; remove it"
        )
    return text
