"""Formats of public data sets, brought to one: what a json object says, and what of it is not read.

    {"messages": [{"role", "content"}], "images": [..]}       to_native   NativeRecord(
    {"conversations": [{"from", "value"}], "image": ..}       -------->       messages, image, videos, system, notes)
    {"query", "response", "history"}, {"instruction", ..}

A data set names its format in the meta json (`format`), or each record is recognised by its keys. Nothing passes
silently: what is understood under another name, and what is not read, is noted; keys that carry media or meaning that
training here cannot use are refused, with the right key.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.samples.messages import Message, from_role_content, from_value
from megatron_v2pe.data.text.templates import Role

# Shapes that a format of the meta json allows.
SHAPES: dict[str, tuple[str, ...]] = {
    "auto": ("from_value", "role_content", "query", "alpaca"),
    "internvl": ("from_value",),
    "sharegpt": ("from_value",),
    "openai": ("role_content",),
    "llama_factory": ("from_value", "role_content", "alpaca"),
    "ms_swift": ("role_content", "query", "from_value"),
    "llava_video": ("from_value",),
}
HINT = "formats are described in docs/data.md, and `convert-data --check` looks through a file"
_LISTS = ("conversations", "messages", "conversation")
_ALIASES = {
    "system_prompt": "system",
    "images": "image",
    "videos": "video",
}
_NATIVE = ("image", "video", "clip", "conversations", "system")
# Not used in training, and written by this package or by nearly every data set.
_SILENT = frozenset(
    ("id", "length", "depth", "width", "height", "width_list", "height_list", "metadata", "meta")
)
# Keys with media or meaning, and what to do about them.
_REFUSED = {
    "audio": "audio is not read; remove the key, or the record",
    "audios": "audio is not read; remove the key, or the record",
    "tools": "tools are not read; write them into the system text",
    "functions": "tools are not read; write them into the system text",
    "objects": "objects are not read; write the boxes into the text, as <box>[[x1, y1, x2, y2]]</box>",
    "chosen": "preference data are not read; write the chosen answer as a turn from 'gpt'",
    "rejected": "preference data are not read; write the chosen answer as a turn from 'gpt'",
    "rejected_response": "preference data are not read; remove the key to train on the other answer",
    "start": 'the part of a video is given as "clip": [start, end] in seconds',
    "end": 'the part of a video is given as "clip": [start, end] in seconds',
    "video_start": 'the part of a video is given as "clip": [start, end] in seconds',
    "video_end": 'the part of a video is given as "clip": [start, end] in seconds',
}
_CLIP_KEYS = ("start", "end", "video_start", "video_end")
# Keys that mask or weigh a whole record, and values of them that change nothing.
_WEIGHTS = {
    "loss": "a record as a whole is not masked; leave it out, or mask its answers ('loss' of a message)",
    "train": "a record as a whole is not masked; leave it out, or mask its answers ('loss' of a message)",
    "loss_mask": "masks of tokens are not read; mask answers ('loss' of a message)",
    "weight": "weights of records are not read; use repeat_time of a data set of their own",
    "sample_weight": "weights of records are not read; use repeat_time of a data set of their own",
    "loss_weight": "weights of records are not read; use repeat_time of a data set of their own",
    **dict.fromkeys(
        ("label", "kto_tag"), "preference data are not read; leave out records whose answer is not wanted"
    ),
}
_MEDIA_FILE = re.compile(
    r"(?i).+\.(?:(?P<image>png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic)|(?P<video>mp4|avi|mov|mkv|webm|m4v|flv)"
    r"|(?P<audio>wav|mp3|flac|m4a|ogg))"
)
_MEANT = {"img": "image", "imgs": "image", "picture": "image", "image_path": "image", "image_paths": "image",
          "image_file": "image", "image_url": "image", "pictures": "image", "image_list": "image", "photo": "image",
          "photos": "image", "frames": "video", "video_list": "video", "media": "image", "video_path": "video",
          "vid": "video", "video_file": "video", "video_url": "video", "video_paths": "video", "clips": "clip",
          "dialog": "conversations", "dialogue": "conversations", "turns": "conversations",
          "sys": "system", "system_text": "system", "system_message": "system"}  # fmt: skip
_QUERY = ("query", "response", "history")
_ALPACA = ("instruction", "input", "output", "history")
_MOST_KEY = 40
_MOST_NAME = 4096  # characters of a path
_MOST_DEPTH, _MOST_ITEMS = 3, 4  # of lists and objects in which files are looked for


@dataclass(frozen=True, kw_only=True)
class NativeRecord:
    """A record of any format.

    Attributes:
        messages: in order; a system text is not among them.
        image: paths as written: one, a list, or None.
        videos: paths as written.
        clip: as written.
        system: system text; empty where there is none.
        has_video_image: `<image>` means the video (LLaVA-Video) where no image is given.
        notes: what was understood under another name, and what is not read; see `notes`.
    """

    messages: list[Message]
    image: Any = None
    videos: list[Any] = field(default_factory=list)
    clip: Any = None
    system: str = ""
    has_video_image: bool = False
    notes: tuple[str, ...] = ()


def to_native(values: Mapping[str, Any], *, format_name: str, where: str) -> NativeRecord:
    """Read a record of any known format.

    Args:
        values: the json object.
        format_name: one of `SHAPES`.
        where: `file:line`, for messages.

    Raises:
        DataError: no known format, another than the data set's, or a key that cannot be used.
    """
    shape, used = _shape(values, where)
    if shape not in SHAPES[format_name]:
        raise DataError(
            f"{where}: {_READS[shape]}, which is not the data set's format {format_name!r}; change 'format' in the "
            f"meta json ({', '.join(SHAPES)})"
        )
    notes = [] if shape == "from_value" and used == ["conversations"] else [f"format:{_NAMES[shape]}"]
    named, keys = _named(values, where)
    system, messages, embedded = _READERS[shape](values, used, where)
    notes += [f"alias:{key}={native}" for native, key in keys.items() if key != native]
    read = {*used, *keys.values()}
    if (
        messages
        and isinstance(values.get("answer"), str)
        and values["answer"].strip() == messages[-1].text.strip()
    ):
        read.add("answer")  # said twice, as records of `synthesize` do
    has_video = bool(named.get("video"))
    has_media = has_video or bool(named.get("image") or embedded["image"] or embedded["video"])
    notes += _others(values, read, has_video=has_video, has_media=has_media, where=where)
    notes += [f"unread:{name}" for name in dict.fromkeys(embedded.get("unread", ()))]
    if any(message.was_renamed for message in messages):
        notes.append("roles")
    return NativeRecord(
        messages=messages,
        image=_one_source("image", named.get("image"), embedded["image"], where),
        videos=_listed(_one_source("video", named.get("video"), embedded["video"], where)),
        clip=named.get("clip"),
        system=_system(named.get("system"), system, where),
        has_video_image=format_name in ("auto", "llava_video", "llama_factory", "sharegpt"),
        notes=tuple(notes),
    )


def _shape(values: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """How the conversation is written, and the keys that hold it."""
    lists = [key for key in _LISTS if values.get(key)]
    if len(lists) > 1:
        raise DataError(f"{where}: has both {lists[0]!r} and {lists[1]!r}; keep one conversation")
    if lists:
        return _shape_of_list(values[lists[0]], lists[0], where), lists
    if any(isinstance(values.get(key), str) for key in ("query", "response")):
        return "query", [key for key in _QUERY if key in values]
    if isinstance(values.get("instruction"), str) and "output" in values:
        return "alpaca", [key for key in _ALPACA if key in values]
    found = next((key for key in _LISTS if key in values), None)
    if found is not None:
        raise DataError(
            f"{where}: {found} must be a list of at least one message, found {shortened(values[found])}"
        )
    near = [key for key in values if _MEANT.get(key) == "conversations"] or difflib.get_close_matches(
        "conversations", list(values), n=1, cutoff=0.75
    )
    hint = f"; is {near[0]!r} meant?" if near else f"; found {_keys_text(values)}"
    raise DataError(f"{where}: key 'conversations' is missing{hint}; {HINT}")


def _shape_of_list(messages: Any, key: str, where: str) -> str:
    if not isinstance(messages, list):
        is_text = isinstance(messages, str) and messages.lstrip().startswith("[")
        raise DataError(
            f"{where}: {key} must be a list of at least one message, found {shortened(messages)}"
            + (", which is json written as a text; write the list itself" if is_text else "")
        )
    first = messages[0]
    is_role = isinstance(first, dict) and "role" in first and "from" not in first
    return "role_content" if is_role else "from_value"


def _named(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the native keys that are not empty, and the key each was written under."""
    named: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key in (*_NATIVE, *_ALIASES):
        native = _ALIASES.get(key, key)
        if native == "conversations" or is_empty(values.get(key)):
            continue
        if native in named:
            raise DataError(f"{where}: has both {native!r} and {key!r}, which mean the same; keep {native!r}")
        named[native], keys[native] = values[key], key
    return named, keys


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, or a list of those."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _others(
    values: Mapping[str, Any], used: set[str], *, has_video: bool, has_media: bool, where: str
) -> list[str]:
    """Notes on the keys that nobody reads.

    Raises:
        DataError: one of them carries media or meaning.
    """
    notes = []
    for key, value in values.items():
        if key in used or key in _SILENT or is_empty(value):
            continue
        name = shortened(key, _MOST_KEY)
        if key in _REFUSED and (key not in _CLIP_KEYS or has_video):
            raise DataError(f"{where}: key {name}: {_REFUSED[key]}")
        if key in _WEIGHTS and not (value in (True, 1) or (key == "label" and value is not False)):
            raise DataError(f"{where}: key {name} is {shortened(value, _MOST_KEY)}: {_WEIGHTS[key]}")
        meant = _MEANT.get(key.lower()) or _near(key, value) or ("" if has_media else _media_named(value))
        if meant == "audio":
            raise DataError(f"{where}: key {name}: {_REFUSED['audio']}")
        if meant:
            raise DataError(f"{where}: unknown key {name}; is {meant!r} meant?")
        notes.append(f"unread:{key[:_MOST_KEY]}")
    return notes


def _media_named(value: Any, depth: int = 0) -> str:
    """The key of a value that names files of pictures or videos, also within lists and objects; empty for any other."""
    if isinstance(value, (list, dict)) and depth < _MOST_DEPTH:
        inner = list(value.values()) if isinstance(value, dict) else value[:_MOST_ITEMS]
        return next(filter(None, (_media_named(each, depth + 1) for each in inner)), "")
    found = _MEDIA_FILE.fullmatch(value) if isinstance(value, str) and len(value) < _MOST_NAME else None
    return str(found.lastgroup) if found else ""


def _near(key: str, value: Any) -> str:
    """A native key that a typo may have meant; empty for none."""
    if not isinstance(value, (str, list)):
        return ""
    names = [*_NATIVE, *_ALIASES, "messages"]
    return next(iter(difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.8)), "")


def _one_source(kind: str, named: Any, embedded: list[Any], where: str) -> Any:
    """Media named by the record, or by the parts of its messages, not by both."""
    if not embedded:
        return named
    if named is not None and _listed(named) != embedded:
        raise DataError(
            f"{where}: {kind} files are named both by the record and inside its messages; keep one"
        )
    return embedded


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _system(named: Any, first: str, where: str) -> str:
    if named is not None and not isinstance(named, str):
        raise DataError(f"{where}: system must be a text, found {shortened(named)}")
    if named and first and named != first:
        raise DataError(f"{where}: has a system text of its own and another in its first message; keep one")
    return named or first


Reader = Callable[[Mapping[str, Any], list[str], str], tuple[str, list[Message], dict[str, list[Any]]]]


def _read_list(read: Callable[..., Message]) -> Reader:
    def reader(
        values: Mapping[str, Any], used: list[str], where: str
    ) -> tuple[str, list[Message], dict[str, list[Any]]]:
        embedded: dict[str, list[Any]] = {"image": [], "video": [], "unread": []}
        key = used[0]
        messages = [
            read(message, f"{where}: {key}[{index}]", embedded=embedded)
            for index, message in enumerate(values[key])
        ]
        if messages[0].role != "system":
            return "", messages, embedded
        return messages[0].text, messages[1:], embedded

    return reader


def _read_pairs(question: str, more: str, answer: str) -> Reader:
    def reader(
        values: Mapping[str, Any], used: list[str], where: str
    ) -> tuple[str, list[Message], dict[str, list[Any]]]:
        def text(key: str) -> str:
            value = values.get(key) or ""
            if not isinstance(value, str):
                raise DataError(f"{where}: {key} must be a text, found {shortened(value)}")
            return value

        history = values.get("history") or []
        if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
            raise DataError(
                f"{where}: history must be a list of [question, answer], found {shortened(history)}"
            )
        last = "\n".join(part for part in (text(question), text(more) if more else "") if part)
        pairs = [*history, [last, text(answer)]]
        roles: tuple[Role, ...] = ("human", "gpt")
        messages = [
            Message(role=role, text=part, where=where)
            for pair in pairs
            for role, part in zip(roles, pair, strict=True)
        ]
        return "", messages, {"image": [], "video": []}

    return reader


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


_READERS: dict[str, Reader] = {
    "from_value": _read_list(from_value),
    "role_content": _read_list(from_role_content),
    "query": _read_pairs("query", "", "response"),
    "alpaca": _read_pairs("instruction", "input", "output"),
}
_READS = {
    "from_value": "has messages of 'from' and 'value'",
    "role_content": "has messages of 'role' and 'content'",
    "query": "has 'query' and 'response'",
    "alpaca": "has 'instruction' and 'output'",
}
_NAMES = {"from_value": "from/value", "role_content": "role/content", "query": "query/response",
          "alpaca": "instruction/output"}  # fmt: skip


def _keys_text(values: Mapping[str, Any]) -> str:
    names = [shortened(key, _MOST_KEY) for key in list(values)[:8]]
    more = ", ..." if len(values) > 8 else ""
    return f"keys {', '.join(names)}{more}" if names else "no key at all"


SYSTEM_NOTE = "system:"
OPENING_NOTE = "opening"
DIGEST_MARK = "(sha256 "
_MOST_SYSTEM = 8000


def system_note(text: str) -> str:
    """Note on a record's own system text; of a very long one only its digest."""
    if len(text) > _MOST_SYSTEM:
        text = f"{DIGEST_MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]})"
    return SYSTEM_NOTE + text


def note_text(note: str, count: int, place: str) -> str:
    """One line on a note of `NativeRecord.notes`.

    Args:
        note: as it was noted.
        count: records that have it.
        place: `file:line` of the first.
    """
    kind, _, rest = note.partition(":")
    if kind == "unread":
        return f"key {rest!r} is not read ({count:,} records, first {place})"
    if kind == "alias":
        key, _, native = rest.partition("=")
        return f"key {key!r} is read as {native!r} ({count:,} records, first {place})"
    if kind == "format":
        return f"records of the form {rest} are recognised ({count:,}, first {place})"
    if note.startswith(SYSTEM_NOTE):
        return f"system texts of records are used: {rest} ({count:,} records, first {place})"
    if kind == "video_image":
        return f"<image> is read as <video>, as in LLaVA-Video ({count:,} records, first {place})"
    if note == OPENING_NOTE:
        return f"a first message from 'gpt' is left out, as in the release ({count:,} records, first {place})"
    return f"roles user and assistant are read as human and gpt ({count:,} records, first {place})"
