"""What the json files of a checkpoint folder say about its tokenizer.

    tokenizer_config.json + special_tokens_map.json + added_tokens.json --> TokenizerFiles

Only data are read. Code that a checkpoint names (`auto_map`) is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import CheckpointError

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OTHERS = "additional_special_tokens"


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
    decoder: dict[int, dict[str, Any]] = {
        int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()
    }
    added = {str(token): int(index) for token, index in read_json(folder / "added_tokens.json").items()}
    added |= {str(entry["content"]): index for index, entry in decoder.items()}
    stated = {**config, **read_json(folder / "special_tokens_map.json")}
    roles = {role: token_content(stated[role]) for role in _ROLES if stated.get(role) is not None}
    if "eos_token" not in roles:
        raise CheckpointError(f"{path}: key 'eos_token' is missing; generation would never end")
    additional = frozenset(token_content(token) for token in stated.get(_OTHERS) or [])
    return TokenizerFiles(
        added=added,
        strips_right=_right_strippers(path, decoder.values()),
        special=additional | set(roles.values()),
        additional=additional,
        roles=roles,
        config=config,
    )


def token_content(value: Any) -> str:
    """A token that is written plainly or as an object with `content`."""
    return str(value["content"]) if isinstance(value, dict) else str(value)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A json object, empty when the file is optional and absent.

    Raises:
        CheckpointError: absent though required, or not a json object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise CheckpointError(
                f"{path}: no such file; give the folder of a Hugging Face InternVL2 checkpoint"
            ) from None
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid json ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a json object")
    return values


def _right_strippers(path: Path, entries: Collection[Mapping[str, Any]]) -> frozenset[str]:
    """Added tokens with `rstrip`; tokens that depend on the text before them or on word borders are refused."""
    for entry in entries:
        if entry.get("lstrip") or entry.get("single_word"):
            raise CheckpointError(
                f"{path}: added token {entry['content']!r} has lstrip or single_word, which no InternVL2 checkpoint "
                "has and this package does not do; set both to false if the model was trained without them"
            )
    return frozenset(str(entry["content"]) for entry in entries if entry.get("rstrip"))
