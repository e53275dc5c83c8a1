"""The checkpoint's own tokenizer, read from its files; no code of the checkpoint is executed.

    text --split at added tokens--> [text, <img>, text, ...] --sentencepiece per text--> ids

Ids and decoded strings equal those of the slow `InternLM2Tokenizer` that the release loads, including its
habits: a dummy prefix (if the sentencepiece model asks for one) at the start of *every* text between special
tokens, and blanks around special tokens when decoding. Blanks are never cleaned up after decoding, as
`clean_up_tokenization_spaces` is false in every InternVL2 checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_v2pe.core.errors import CheckpointError

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SUPPORTED_CLASSES = ("InternLM2Tokenizer",)
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What the json files of a checkpoint folder say about its tokenizer.

    Attributes:
        added: token -> id, everything that is cut out of the text before sentencepiece sees it.
        special: tokens that `skip_special_tokens` drops.
        roles: `bos_token`, `eos_token`, ... -> token.
        add_bos: the configuration wants a beginning-of-sequence token.
    """

    added: dict[str, int]
    special: frozenset[str]
    roles: dict[str, str]
    add_bos: bool


class Tokenizer:
    """Text to ids and back.

    Built by `load_tokenizer`. Picklable, so that loader workers can hold one.

    Attributes:
        bos_id: beginning of sequence.
        eos_id: end of sequence.
        pad_id: padding; InternLM2 pads with its end-of-sequence token.
        image_token_id: id of `<IMG_CONTEXT>`, the token that image features replace.
        fingerprint: digest of everything that decides ids; part of the key of cached lengths.
    """

    def __init__(self, model_bytes: bytes, files: TokenizerFiles) -> None:
        self._model_bytes, self._files = model_bytes, files
        self._pieces = sentencepiece.SentencePieceProcessor()
        self._pieces.LoadFromSerializedProto(model_bytes)
        self._num_pieces = self._pieces.GetPieceSize()
        self._added_by_id = {index: token for token, index in files.added.items()}
        # Longest first, so that at one place in the text the longest added token wins.
        names = sorted(files.added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._special_ids = {files.added[token] for token in files.special}
        self.bos_id = self.token_id(files.roles["bos_token"])
        self.eos_id = self.token_id(files.roles["eos_token"])
        self.pad_id = self.token_id(files.roles.get("pad_token", files.roles["eos_token"]))
        self.image_token_id = self.token_id(IMAGE_CONTEXT)
        added = json.dumps([sorted(files.added.items()), files.add_bos])
        self.fingerprint = hashlib.sha256(model_bytes + added.encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._model_bytes, self._files)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return max(self._num_pieces, max(self._added_by_id) + 1)

    def token_id(self, token: str) -> int:
        """Id of one token.

        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        if token in self._files.added:
            return self._files.added[token]
        index = int(self._pieces.PieceToId(token))
        if index == self._pieces.unk_id() and token != self._pieces.IdToPiece(index):
            raise CheckpointError(
                f"the checkpoint's tokenizer has no token {token!r}; is this an InternVL2 checkpoint?"
            )
        return index

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of a text in which added tokens (`<img>`, `<|im_end|>`, ...) are recognised."""
        return self.encode_marked(text, (), add_bos=add_bos)[0]

    def encode_marked(
        self, text: str, marks: Sequence[int], *, add_bos: bool = True
    ) -> tuple[list[int], list[int]]:
        """Ids of a text, and where given places of the text lie among them.

        Args:
            text: any text; added tokens are recognised.
            marks: ascending character offsets into `text`, none inside an added token.
            add_bos: put the beginning-of-sequence token first, if the checkpoint wants one.

        Returns:
            ids, and for each mark the number of tokens that lie wholly before it. A token that straddles
            a mark counts as after it.
        """
        ids = [self.bos_id] if add_bos and self._files.add_bos else []
        places: list[int] = []
        start = 0
        for part in self._splitter.split(text):
            end = start + len(part)
            added = self._files.added.get(part)
            chunk = [added] if added is not None else (self._pieces.EncodeAsIds(part) if part else [])
            while len(places) < len(marks) and marks[len(places)] < end:
                prefix = part[: marks[len(places)] - start]
                inside = _common_prefix(self._pieces.EncodeAsIds(prefix), chunk) if prefix else 0
                places.append(len(ids) + inside)
            ids.extend(chunk)
            start = end
        places.extend([len(ids)] * (len(marks) - len(places)))
        return ids, places

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids.

        Args:
            ids: token ids, each in 0..vocab_size-1.
            skip_special_tokens: leave special tokens out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        groups: list[str] = []  # texts and tokens beyond sentencepiece, later joined by blanks
        run: list[int] = []
        for index in ids:
            if skip_special_tokens and index in self._special_ids:
                continue
            if index >= self._num_pieces:
                if index not in self._added_by_id:
                    raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
                groups += [text for text in [self._decode_run(run)] if text]
                groups.append(self._added_by_id[index])
                run = []
            else:
                run.append(index)
        if run:
            groups.append(self._decode_run(run))
        return " ".join(groups)

    def tokenize(self, text: str) -> list[str]:
        """Vocabulary entries of a text: added tokens and sentencepiece's pieces with their word marks."""
        tokens: list[str] = []
        for part in filter(None, self._splitter.split(text)):
            tokens += [part] if part in self._files.added else self._pieces.EncodeAsPieces(part)
        return tokens

    def _decode_run(self, ids: Sequence[int]) -> str:
        """Decode ids below the sentencepiece size; a blank precedes each run of special tokens."""
        text, after_special = "", False
        plain: list[int] = []
        for index in ids:
            if index in self._special_ids:
                text += "" if after_special else " "
                text += self._decode_plain(plain) + self._added_by_id[index]
                plain, after_special = [], True
            else:
                plain.append(index)
                after_special = False
        return text + self._decode_plain(plain)

    def _decode_plain(self, ids: list[int]) -> str:
        return str(self._pieces.DecodeIds(ids)) if ids else ""


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two id lists."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face InternVL2 folder.

    Reads `tokenizer.model`, `tokenizer_config.json` and, when present, `added_tokens.json` and
    `special_tokens_map.json`.

    Raises:
        CheckpointError: a file is missing or damaged, the tokenizer class is not supported, or a token of
            InternVL2 is absent.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json", required=True)
    kind = config.get("tokenizer_class", "")
    if kind not in SUPPORTED_CLASSES:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class is {kind!r}; "
            f"supported: {', '.join(SUPPORTED_CLASSES)}"
        )
    model_path = folder / "tokenizer.model"
    try:
        model_bytes = model_path.read_bytes()
        pieces = sentencepiece.SentencePieceProcessor()
        pieces.LoadFromSerializedProto(model_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{model_path}: no such file; the tokenizer of {kind} needs it") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{model_path}: not a sentencepiece model ({error})") from None
    return Tokenizer(model_bytes, _read_files(folder, config, pieces))


def _read_files(
    folder: Path, config: dict[str, Any], pieces: sentencepiece.SentencePieceProcessor
) -> TokenizerFiles:
    """Merge the json files: added tokens with their ids, special tokens, and which token has which role."""
    added = {str(token): int(index) for token, index in _read_json(folder / "added_tokens.json").items()}
    for index, entry in config.get("added_tokens_decoder", {}).items():
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added token {entry['content']!r} strips its "
                "neighbours, which the InternLM2 tokenizer of this package does not do"
            )
        added[entry["content"]] = int(index)
    stated = {**config, **_read_json(folder / "special_tokens_map.json")}
    roles: dict[str, str] = {}
    special: set[str] = set()
    for key in _SPECIAL_KEYS:
        values = stated.get(key) or []
        names = [_content(value) for value in (values if isinstance(values, list) else [values])]
        special.update(names)
        if names and key != "additional_special_tokens":
            roles[key] = names[0]
    for key in ("bos_token", "eos_token"):
        if key not in roles:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: key {key!r} is missing")
    for token in special - added.keys():
        added[token] = int(pieces.PieceToId(token))
    return TokenizerFiles(
        added=added,
        special=frozenset(special),
        roles=roles,
        add_bos=bool(config.get("add_bos_token", True)),
    )


def _content(value: Any) -> str:
    """A token that is written plainly or as an object with `content`."""
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A json object, empty when the file is optional and absent."""
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
