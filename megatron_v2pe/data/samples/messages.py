"""One message of a record, as public formats write it: from/value or role/content.

    {"from": "human", "value": "..."}                        InternVL, ShareGPT
    {"role": "user", "content": "..."}                       OpenAI, ms-swift, LLaMA-Factory
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]}

`"loss": false` (ms-swift), `"weight": 0` (OpenAI) and `"train": false` mask an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER
from megatron_v2pe.data.text.templates import Role

_ROLES: dict[str, Role] = {
    "human": "human",
    "gpt": "gpt",
    "system": "system",
    "pretrain": "pretrain",
    "user": "human",
    "assistant": "gpt",
    "model": "gpt",
    "bot": "gpt",
    "chatgpt": "gpt",
    "developer": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_MASKS = ("loss", "weight", "train")
# Keys of a message that say nothing that is trained on.
_SILENT = frozenset(("id", "name", "timestamp", "index", "length", "turn", "turn_id", "message_id"))
_MOST_NOTE = 40
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message with its role as this package names it.

    Attributes:
        role: human, gpt or system; tool of what a function returned; pretrain of a text without a template.
        text: what it says, with placeholders.
        where: `file:line: conversations[n]`, for messages.
        supervised: false where the record masks it.
        was_renamed: the record names the role otherwise.
    """

    role: Role
    text: str
    where: str
    supervised: bool = True
    was_renamed: bool = False


def from_value(message: Any, where: str, *, embedded: dict[str, list[Any]]) -> Message:
    """A message of `from` and `value`.

    Raises:
        DataError: not such an object.
    """
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise DataError(f"{where} must be an object with 'from' and a text 'value'{_found(message)}")
    return _message(message, "from", message["value"], where, keys=("from", "value"))


def from_role_content(message: Any, where: str, *, embedded: dict[str, list[Any]]) -> Message:
    """A message of `role` and `content`.

    Args:
        message: as it was parsed.
        where: for messages.
        embedded: by `image` and `video`, gets the files that parts of the content name; by `unread`, their other keys.

    Raises:
        DataError: not such an object.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
        raise DataError(
            f"{where} must be an object with 'role' and 'content', a text or a list{_found(message)}"
        )
    content = message["content"]
    text = content if isinstance(content, str) else _joined(content, where, embedded)
    return _message(message, "role", text, where, keys=("role", "content"))


def _found(message: Any) -> str:
    if not isinstance(message, dict):
        return f", found {shortened(message)}"
    names = ", ".join(shortened(key, 40) for key in list(message)[:6])
    for key in ("value", "content"):
        if key in message and not isinstance(message[key], str):
            return f"; its {key} is {shortened(message[key])}"
    return f"; found keys {names or 'none'} (formats: docs/data.md)"


def _message(
    message: dict[str, Any], role_key: str, text: str, where: str, *, keys: tuple[str, str]
) -> Message:
    said = message.get(role_key)
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        what = "; tool calls are not used in training here" if said == "function_call" else ""
        raise DataError(
            f"{where}.{role_key} is {shortened(said)}, but must be 'human' or 'gpt' ('user', 'assistant'), or 'system' "
            f"in the first, or 'function' before an answer, or 'pretrain' of a single one{what}"
        )
    supervised = True
    for key, value in message.items():
        if key in _MASKS and value is not None:
            supervised = supervised and _is_learned(value, f"{where}.{key}")
        elif key not in keys and key not in _SILENT and value not in (None, "", [], {}):
            raise DataError(
                f"{where}: unknown key {shortened(key, 40)}; a message has {keys[0]!r}, {keys[1]!r} and 'loss'"
                + ("; tool calls are not used here" if key in ("tool_calls", "tool_call_id") else "")
            )
    return Message(
        role=role, text=text, where=where, supervised=supervised, was_renamed=role not in (said, "tool")
    )


def _is_learned(value: Any, where: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(f"{where} is {shortened(value)}, but must be true or false; other weights are not used")


def _joined(parts: list[Any], where: str, embedded: dict[str, list[Any]]) -> str:
    """The text of a list of parts; a placeholder is on a line of its own."""
    text = ""
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind.removeprefix("input_") if isinstance(kind, str) else kind  # OpenAI's responses
        if isinstance(part, str):
            text += part
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url", "video", "video_url"):
            text += _medium(part, kind.removesuffix("_url"), f"{where}.content[{index}]", embedded)
        else:
            raise DataError(
                f"{where}.content[{index}] is {shortened(part)}, but must be a part of type text, image or video"
            )
    return text


def _medium(part: dict[str, Any], kind: str, where: str, embedded: dict[str, list[Any]]) -> str:
    holders = (kind, f"{kind}_url", "url", "path")
    for key, value in part.items():
        if key in ("video_start", "video_end") and value is not None:
            raise DataError(
                f'{where}: {key} of a part: the part of a video is given as "clip": [start, end] of the record'
            )
        if key not in (*holders, "type", "index", "text") and value is not None:
            embedded["unread"].append(f"{key} ({kind} part)"[:_MOST_NOTE])
    names = [part[key] for key in holders if part.get(key)]
    others = [key for key in part if key not in (*holders, "type", "index", "text") and part[key] is not None]
    if not names and others:
        raise DataError(
            f"{where}: a part of type {kind} names its file as {', '.join(map(repr, holders))}; found "
            f"{', '.join(shortened(key, 40) for key in others[:4])}"
        )
    if names:
        name = names[0]
        name = name.get("url") if isinstance(name, dict) else name
        embedded[kind].append(name.removeprefix("file://") if isinstance(name, str) else name)
    return _PLACEHOLDERS[kind] + "\n"
