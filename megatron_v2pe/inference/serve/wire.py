"""Requests of OpenAI's chat completions as ours, and answers as theirs.

What cannot be honoured is refused with a reason; no field is accepted and ignored.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.media.video import VIDEO_PLACEHOLDER
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.sampling import Sampling

_ROLES = {"user": "human", "assistant": "gpt"}
_MEDIA_TYPES = {"image_url": "image", "video_url": "video"}
_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
}
_SAMPLING_FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "min_tokens": int,
}
_MOST_NUMBER = 1e300  # json has numbers that no float can hold, and NaN
_MOST_STOPS = 64
_MESSAGE_FIELDS = {"role", "content", "name"}
_ONLY = {"frequency_penalty": (0,), "presence_penalty": (0,)}
_KNOWN = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "stride",
    "logprobs", "top_logprobs", "user", "n", *_SAMPLING_FIELDS, *_ONLY,
}  # fmt: skip


_PLAIN_FIELDS = ("system", "num_choices", "stride", "num_top", "stream", "with_usage")


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        code: a word for programs.
        message: a sentence for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        model: name that requests must give.
        media_root: folder of files that requests may name; "" allows none.
        max_new_tokens: longest answer.
        default_new_tokens: where a request names none.
        max_choices: answers to one request (`n`).
        max_images: images and videos of a request.
        max_body_bytes: of a request.
        temperature: where a request names none.
    """

    model: str
    media_root: str = ""
    max_new_tokens: int = 8192
    default_new_tokens: int = 256
    max_choices: int = 4
    max_images: int = 4096
    max_body_bytes: int = 512 * 2**20
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """An image or video of a request: a file inside the allowed folder, or bytes that came with it.

    Attributes:
        path: file; "" where the content came along.
        content: base64 of the bytes, "" for a file.
        suffix: of a file that is made of them.
    """

    path: str = ""
    content: str = ""
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request.

    Attributes:
        messages: human and gpt in turn; attachments are numbers into `attachments`, as text.
        attachments: images and videos.
        system: replaces the template's system text; None keeps it.
        sampling: how to answer.
        num_choices: answers that are wanted.
        stride: position units of a visual token; None is the server's.
        num_top: most probable tokens to report with each token; None reports no log-probabilities.
        stream: the answer is sent as it is made.
        with_usage: a stream ends with token counts.
    """

    messages: tuple[Message, ...]
    attachments: tuple[Attachment, ...]
    system: str | None
    sampling: Sampling
    num_choices: int
    stride: int | None
    num_top: int | None
    stream: bool
    with_usage: bool

    @property
    def samplings(self) -> list[Sampling]:
        """How each answer is made: answer i is the one that a request with seed + i alone would get."""
        seed = self.sampling.seed
        return [replace(self.sampling, seed=seed + number) for number in range(self.num_choices)]

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChatRequest:
        """The inverse of `to_json`."""
        sampling = {**data["sampling"], "stop": tuple(data["sampling"]["stop"])}
        messages = tuple(
            Message(role=m["role"], text=m["text"], images=tuple(m["images"]), videos=tuple(m["videos"]))
            for m in data["messages"]
        )
        attachments = tuple(Attachment(**attachment) for attachment in data["attachments"])
        rest = {key: data[key] for key in _PLAIN_FIELDS}
        return cls(messages=messages, attachments=attachments, sampling=Sampling(**sampling), **rest)


def parse_request(values: Any, limits: Limits) -> ChatRequest:
    """Check the body of a request.

    Raises:
        RequestError: 400 or 404, with what is wrong.
    """
    if not isinstance(values, dict):
        raise _bad("the body must be a json object")
    unknown = sorted(set(values) - _KNOWN)
    if unknown:
        raise _bad(
            f"unknown fields {', '.join(unknown)}; known are {', '.join(sorted(_KNOWN))}", "unknown_field"
        )
    for name, allowed in _ONLY.items():
        if values.get(name) is not None and values[name] not in allowed:
            raise _bad(f"{name} is {values[name]!r}, but only {allowed[0]} is supported", "unsupported_value")
    if values.get("model") != limits.model:
        message = f"model {values.get('model')!r} is not served here; this is {limits.model!r}"
        raise RequestError(404, "model_not_found", message)
    parser = _Messages(limits)
    messages = parser.parse(values.get("messages"))
    return ChatRequest(
        messages=messages,
        attachments=tuple(parser.attachments),
        system=parser.system,
        sampling=_sampling(values, limits),
        num_choices=_num_choices(values, limits),
        stride=_whole(values, "stride"),
        num_top=_num_top(values),
        stream=_flag(values, "stream"),
        with_usage=_with_usage(values),
    )


def _bad(message: str, code: str = "bad_request") -> RequestError:
    return RequestError(400, code, message)


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{name} must be true or false, found {value!r}")
    return bool(value)


def _with_usage(values: dict[str, Any]) -> bool:
    options = values.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise _bad(f"stream_options is {shortened(options)}, but must be an object with include_usage")
    return _flag(options, "include_usage")


def _whole(values: dict[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise _bad(f"{name} must be a whole number, found {value!r}")
    return value


def _num_choices(values: dict[str, Any], limits: Limits) -> int:
    count = _whole(values, "n")
    if count is not None and not 1 <= count <= limits.max_choices:
        raise _bad(f"n is {count}, but must lie in 1..{limits.max_choices} (--max-running of this server)")
    return 1 if count is None else count


def _num_top(values: dict[str, Any]) -> int | None:
    if not _flag(values, "logprobs"):
        return None
    count = _whole(values, "top_logprobs") or 0
    if not 0 <= count <= 20:
        raise _bad(f"top_logprobs is {count}, but must lie in 0..20")
    return count


def _sampling(values: dict[str, Any], limits: Limits) -> Sampling:
    chosen: dict[str, Any] = {"temperature": limits.temperature}
    for name, kind in _SAMPLING_FIELDS.items():
        value = values.get(name)
        if value is None:
            continue
        if not _is_number(value, is_whole=kind is int):
            raise _bad(f"{name} must be a {'whole ' if kind is int else ''}number, found {shortened(value)}")
        chosen["min_new_tokens" if name == "min_tokens" else name] = kind(value)
    if chosen["temperature"] == 0:  # greedy takes the most probable token, whatever would be cut away
        chosen = {key: value for key, value in chosen.items() if key not in ("top_p", "top_k", "min_p")}
    wanted = _whole(values, "max_completion_tokens")
    wanted = _whole(values, "max_tokens") if wanted is None else wanted
    longest = limits.default_new_tokens if wanted is None else wanted
    if longest > limits.max_new_tokens:
        raise _bad(
            f"max_tokens is {longest}, but this server's limit is {limits.max_new_tokens}", "too_many_tokens"
        )
    stop = values.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > _MOST_STOPS
        or not all(isinstance(text, str) for text in stop)
    ):
        raise _bad(f"stop must be a text or a list of at most {_MOST_STOPS} texts")
    try:
        return Sampling(max_new_tokens=longest, stop=tuple(stop), **chosen)
    except ConfigError as error:
        raise _bad(str(error)) from None


def _is_number(value: Any, *, is_whole: bool) -> bool:
    """A finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MOST_NUMBER:
        return False
    return not is_whole or value == int(value)


def _role(message: dict[str, Any], where: str) -> str:
    """The role of a message that says nothing else than what is read; empty for none."""
    unknown = {key for key, value in message.items() if value not in (None, [])} - _MESSAGE_FIELDS
    if unknown:
        names, known = ", ".join(sorted(unknown)), ", ".join(sorted(_MESSAGE_FIELDS))
        raise _bad(f"{where} has {names}; known are {known}", "unknown_field")
    role = message.get("role")
    return role if isinstance(role, str) else ""


class _Messages:
    """Messages of a request, one after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.attachments: list[Attachment] = []
        self.system: str | None = None

    def parse(self, values: Any) -> tuple[Message, ...]:
        """Turns of a conversation; the system text goes to `system`."""
        if not isinstance(values, list) or not values:
            raise _bad("messages must be a list of at least one message")
        turns: list[Message] = []
        for index, message in enumerate(values):
            if not isinstance(message, dict):
                raise _bad(f"messages[{index}] must be an object")
            role = _role(message, f"messages[{index}]")
            if role in ("system", "developer") and index == 0:
                self.system = self._parts(message, f"messages[{index}]").text
            elif role in _ROLES:
                turns.append(self._parts(message, f"messages[{index}]"))
            else:
                found = shortened(message.get("role"))
                raise _bad(
                    f"messages[{index}].role is {found}, but must be user or assistant (system comes first)"
                )
        for index, turn in enumerate(turns):
            if turn.role != ("human", "gpt")[index % 2]:
                raise _bad("messages must alternate user, assistant, user, ...")
        if not turns or turns[-1].role != "human":
            raise _bad("the last message must be the user's")
        if len(self.attachments) > self._limits.max_images:
            raise _bad(
                f"{len(self.attachments)} images, but this server's limit is {self._limits.max_images}"
            )
        return tuple(turns)

    def _parts(self, message: dict[str, Any], where: str) -> Message:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise _bad(f"{where}.content must be a text or a list of parts")
        text, images, videos = "", list[str](), list[str]()
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            kind = kind if isinstance(kind, str) else ""
            if kind == "text" and isinstance(part.get("text"), str):
                text += _literal(part["text"])
            elif kind in _MEDIA_TYPES and message.get("role") == "user":
                held, mark = (
                    (images, IMAGE_PLACEHOLDER) if kind == "image_url" else (videos, VIDEO_PLACEHOLDER)
                )
                held.append(str(len(self.attachments)))
                self.attachments.append(self._attachment(part.get(kind), where))
                text += f"{mark}\n"
            else:
                raise _bad(
                    f"{where}.content has a part of type {kind!r}; text, image_url and video_url are known"
                )
        role = _ROLES.get(str(message.get("role")), "human")
        return Message(role=role, text=text, images=tuple(images), videos=tuple(videos))  # type: ignore[arg-type]

    def _attachment(self, value: Any, where: str) -> Attachment:
        url = value.get("url") if isinstance(value, dict) else value
        if not isinstance(url, str):
            raise _bad(f"{where}: an image needs a url")
        if url.startswith("data:"):
            return _inline(url, where)
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise _bad(f"{where}: {shortened(url)} is no address ({error})", "unsupported_url") from None
        if parts.scheme not in ("", "file"):
            raise _bad(
                f"{where}: {parts.scheme} addresses are not fetched; send the bytes as a data: url",
                "unsupported_url",
            )
        return Attachment(path=_inside(unquote(parts.path), self._limits.media_root, where))


def _literal(text: str) -> str:
    """A text of a request, in which `<image>` is text: images are parts of their own."""
    for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
        text = text.replace(mark, "\\" + mark)
    return text


def _inline(url: str, where: str) -> Attachment:
    head, comma, content = url.removeprefix("data:").partition(",")
    media_type, _, encoding = head.partition(";")
    if not comma or encoding != "base64" or media_type not in _SUFFIXES:
        raise _bad(f"{where}: a data: url must be base64 of one of {', '.join(_SUFFIXES)}")
    try:
        base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(f"{where}: a data: url holds no valid base64") from None
    return Attachment(content=content, suffix=_SUFFIXES[media_type])


def _inside(name: str, root: str, where: str) -> str:
    """A file below the allowed folder, links resolved; the same message whether it exists or not."""
    if not root:
        raise _bad(f"{where}: this server reads no files; send the bytes as a data: url", "files_not_allowed")
    folder = Path(root).resolve()
    try:
        path = (folder / name).resolve()
        is_there = path.is_relative_to(folder) and path.exists()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # too long, a null character, half a surrogate pair, a loop of links
        is_there = False
    if not is_there:
        raise _bad(f"{where}: {shortened(name)} is no file of this server's media folder", "file_not_found")
    return str(path)


@dataclass(kw_only=True)
class Usage:
    """Tokens of a request.

    Attributes:
        prompt: of the prompt, visual ones included.
        visual: visual ones.
        cached: of the prompt, known from an earlier request.
        generated: of all answers.
        last_position: whole position of the last token that was fed, in the longest answer.
        stride: position units of a visual token.
    """

    prompt: int = 0
    visual: int = 0
    cached: int = 0
    generated: int = 0
    last_position: int = 0
    stride: int = 0

    def to_json(self) -> dict[str, Any]:
        """As OpenAI reports it, with our own counts under `v2pe`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "v2pe": {
                "visual_tokens": self.visual,
                "last_position": self.last_position,
                "stride": self.stride,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: which answer of the request.
        text: what is new.
        tokens: log-probabilities of what is new, in OpenAI's form; empty unless asked for.
        finish_reason: `stop` or `length` with the last piece of that answer.
    """

    index: int = 0
    text: str
    tokens: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None


@dataclass(kw_only=True)
class Reply:
    """Identity of one answer, in every part of it."""

    request_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}

    def chunk(
        self, piece: Piece | None, *, opens: bool = False, usage: Usage | None = None
    ) -> dict[str, Any]:
        """One event of a stream; without a piece the one that carries token counts."""
        choices: list[dict[str, Any]] = []
        if piece is not None:
            delta = {"content": piece.text} | ({"role": "assistant"} if opens else {})
            choice = {
                "index": piece.index,
                "delta": delta,
                "finish_reason": piece.finish_reason,
                "logprobs": None,
            }
            if piece.tokens:
                choice["logprobs"] = {"content": list(piece.tokens)}
            choices.append(choice)
        body = {**self._head("chat.completion.chunk"), "choices": choices}
        return body if usage is None else {**body, "usage": usage.to_json()}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All answers at once."""
        by_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_choice.setdefault(piece.index, []).append(piece)
        choices = [_choice(index, by_choice[index]) for index in sorted(by_choice)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_json()}


def _choice(index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    tokens = [token for piece in pieces for token in piece.tokens]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
    return {
        "index": index,
        "message": message,
        "finish_reason": pieces[-1].finish_reason,
        "logprobs": {"content": tokens} if tokens else None,
    }
