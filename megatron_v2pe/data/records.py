"""One line of an annotation file: parsed, checked, image paths resolved. Nothing is opened.

Example: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}; a text
record has no image, one with several has a list.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.images import resolve_path
from megatron_v2pe.data.meta import DatasetEntry
from megatron_v2pe.data.templates import Turn
from megatron_v2pe.data.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked conversation.

    Attributes:
        sample_id: `data set:line`, the sample's identity in logs, plans and random draws.
        where: `file:line`, for messages.
        turns: human and gpt in turn, human first; as many placeholders in all as there are images.
        images: paths, in order of their placeholders.
    """

    sample_id: str
    where: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def parse_line(line: bytes, *, entry: DatasetEntry, line_number: int) -> Record:
    """Parse one line of an annotation file.

    Args:
        line: the line as read, utf-8.
        entry: its data set.
        line_number: 1-based.

    Raises:
        DataError: `file:line: ...`, for anything that is not a usable text or image record.
    """
    where = f"{entry.annotation}:{line_number}"
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not utf-8 ({error})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid json ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: must be a json object, found {type(values).__name__}")
    return parse_record(values, entry=entry, sample_id=f"{entry.name}:{line_number}", where=where)


def parse_record(values: dict[str, Any], *, entry: DatasetEntry, sample_id: str, where: str) -> Record:
    """Check one record; see `parse_line`."""
    images = _parse_images(values, entry, where)
    turns = _parse_turns(values.get("conversations"), where)
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
    return Record(sample_id=sample_id, where=where, turns=turns, images=images)


def _parse_images(values: dict[str, Any], entry: DatasetEntry, where: str) -> tuple[str, ...]:
    image = values.get("image")
    if not image and values.get("video"):
        raise DataError(f"{where}: video samples are not supported; give frames as a list of images")
    if not image:
        return ()
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: image must be a path or a list of paths, found {image!r}")
    root = entry.root2 if isinstance(image, list) and entry.root2 else entry.root
    return tuple(_image_path(name, root, entry, where) for name in names)


def _image_path(name: str, root: str, entry: DatasetEntry, where: str) -> str:
    """Web addresses are files named by their hash below `http_root`, as in the release."""
    if name.lower().startswith("http") and entry.http_root:
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
    for token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT):
        if token in value:
            raise DataError(
                f"{where}: conversations[{index}] contains the reserved token {token}; images are marked by "
                f"{IMAGE_PLACEHOLDER}"
            )
    return Turn(role=role, value=value)
