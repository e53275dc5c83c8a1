"""What the json files of a checkpoint folder say about its tokenizer.

    tokenizer_config.json + special_tokens_map.json + added_tokens.json --> TokenizerFiles

Only data are read. Code that a checkpoint names (`auto_map`) is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import read_json_object

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OTHERS = "additional_special_tokens"
_MOST_IDS, _SHOWN, _LONGEST = 2**24, 60, 1024
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Tokens beside the vocabulary, and the switches of the tokenizer.

    Attributes:
        added: token -> id, everything that is cut out of the text before the vocabulary sees it. Special tokens
            that are entries of the vocabulary are not listed in every folder; `load_tokenizer` puts them in.
        strips_right: added tokens that swallow the blanks and line breaks after them.
        special: tokens that `skip_special_tokens` drops.
        additional: those of `special` that have no role.
        roles: `bos_token`, `eos_token`, ... -> token; a role that nobody has is absent.
        config: tokenizer_config.json.
    """

    added: dict[str, int]
    strips_right: frozenset[str]
    special: frozenset[str]
    additional: frozenset[str]
    roles: dict[str, str]
    config: dict[str, Any]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Merge the json files of a folder.

    Raises:
        CheckpointError: a file is missing or damaged, no token ends a sequence, or an added token asks for what
            this package does not do.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path, required=True)
    decoder = _decoder(path, config.get("added_tokens_decoder") or {})
    named = folder / "added_tokens.json"
    added = {token: token_index(named, token, index) for token, index in read_json(named).items()}
    added = _agreed(folder, added, {entry["content"]: index for index, entry in decoder.items()})
    stated = {**config, **read_json(folder / "special_tokens_map.json")}
    roles = {role: _content(path, role, stated[role]) for role in _ROLES if stated.get(role) is not None}
    if "eos_token" not in roles:
        raise CheckpointError(f"{path}: key 'eos_token' is missing; generation would never end")
    others = stated.get(_OTHERS) or []
    if not isinstance(others, list):
        raise CheckpointError(f"{path}: {_OTHERS} must be a list, found {type(others).__name__}")
    additional = frozenset(_content(path, _OTHERS, token) for token in others)
    return TokenizerFiles(
        added=added,
        strips_right=_right_strippers(path, decoder.values()),
        special=additional | set(roles.values()),
        additional=additional,
        roles=roles,
        config=config,
    )


def _content(path: Path, key: str, value: Any) -> str:
    """A token that is written plainly or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not _is_token(text):
        raise CheckpointError(
            f"{path}: {key} must be a token, or an object with its text as 'content'; found "
            f"{str(value)[:_SHOWN]!r}"
        )
    return str(text)


def _is_token(value: Any) -> bool:
    """A short text of characters that exist; half of a surrogate pair is none."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and not _SURROGATE.search(value)


def token_index(path: Path, token: Any, index: Any) -> int:
    """The id of an added token as a file has it.

    Raises:
        CheckpointError: no token, or no id.
    """
    if not _is_token(token) or type(index) is not int or not 0 <= index <= _MOST_IDS:
        raise CheckpointError(
            f"{path}: token {str(token)[:_SHOWN]!r} has the id {str(index)[:_SHOWN]!r}; expected a text and a whole "
            f"number in 0..{_MOST_IDS:,}"
        )
    return index


def _decoder(path: Path, values: Any) -> dict[int, dict[str, Any]]:
    """`added_tokens_decoder`: id -> object with `content` and switches."""
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: added_tokens_decoder must be an object, found {type(values).__name__}"
        )
    decoder: dict[int, dict[str, Any]] = {}
    for key, entry in values.items():
        token = entry.get("content") if isinstance(entry, dict) else None
        index = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key
        decoder[token_index(path, token, index)] = entry
    return decoder


def _agreed(folder: Path, listed: dict[str, int], decoded: dict[str, int]) -> dict[str, int]:
    """Added tokens of both files, which must not contradict each other.

    Raises:
        CheckpointError: a token has two ids, or an id has two tokens.
    """
    both = {**listed, **decoded}
    for token, index in listed.items():
        if both[token] != index:
            raise CheckpointError(
                f"{folder}: token {token!r} has id {index} in added_tokens.json and {both[token]} in "
                "tokenizer_config.json (added_tokens_decoder); take both files from one checkpoint"
            )
    owners: dict[int, str] = {}
    for token, index in both.items():
        if owners.setdefault(index, token) != token:
            raise CheckpointError(
                f"{folder}: id {index} belongs to two added tokens, {owners[index]!r} and {token!r}; take "
                "added_tokens.json and tokenizer_config.json from one checkpoint"
            )
    return both


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A json object, empty when the file is optional and absent.

    Raises:
        CheckpointError: absent though required, or not a json object.
    """
    try:
        return read_json_object(path)
    except FileNotFoundError:
        if required:
            raise CheckpointError(
                f"{path}: no such file; give the folder of a Hugging Face InternVL2 checkpoint"
            ) from None
        return {}


def _right_strippers(path: Path, entries: Collection[Mapping[str, Any]]) -> frozenset[str]:
    """Added tokens with `rstrip`; tokens that depend on the text before them or on word borders are refused."""
    for entry in entries:
        if entry.get("lstrip") or entry.get("single_word"):
            raise CheckpointError(
                f"{path}: added token {entry['content']!r} has lstrip or single_word, which no InternVL2 checkpoint "
                "has and this package does not do; set both to false if the model was trained without them"
            )
    return frozenset(str(entry["content"]) for entry in entries if entry.get("rstrip"))
