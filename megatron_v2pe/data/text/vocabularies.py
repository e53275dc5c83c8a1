"""Vocabularies: text between added tokens to ids and back, one class for each kind of checkpoint.

    InternLM2   sentencepiece                                        2B, 8B, 26B
    Llama       sentencepiece, two ways of treating blanks           4B (Phi-3), 40B (Yi)
    byte level  byte pair encoding of UTF-8 bytes, see byte_level    1B (Qwen2), 76B (Llama-3)

A vocabulary knows nothing of added tokens except how decoding joins text around them, because each of the
tokenizers that the release loads has habits of its own there. `Tokenizer` cuts text and ids at added tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import MAX_JSON_BYTES, read_plain

WORD_MARK = "\u2581"
# Field normalizer_spec.add_dummy_prefix = false of a sentencepiece model. Protocol buffers merge when their
# bytes are joined, so appending it switches the dummy prefix off without a parser.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Vocabulary(Protocol):
    """What `Tokenizer` needs; all implementations can be pickled.

    Attributes:
        size: number of ids, added tokens not counted.
        joiner: what decoding writes between texts and added tokens.
        opening: what `prepare` puts in front of a text.
    """

    size: int
    joiner: str
    opening: str

    def digest(self) -> bytes:
        """Identity of everything that decides ids."""

    def prepare(self, text: str) -> str:
        """A whole text before it is cut at added tokens: of equal length, or longer by `opening`."""

    def token_id(self, token: str) -> int | None:
        """Id of an entry, None if there is no such entry."""

    def token(self, index: int) -> str:
        """Entry of an id in 0..size-1."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""

    def entries(self, text: str) -> list[str]:
        """Entries of a text without added tokens, with their word marks."""

    def to_text(self, tokens: Sequence[str], special: Container[str]) -> str:
        """Text of entries, among which special tokens may be."""


class InternLM2Vocabulary:
    """Sentencepiece as InternLM2 uses it: a blank precedes each run of special tokens when decoding."""

    joiner = " "
    opening = ""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.size = int(self._processor.GetPieceSize())

    def __reduce__(self) -> tuple[Any, ...]:
        return InternLM2Vocabulary, (self._model,)

    def digest(self) -> bytes:
        """Digest of the model file."""
        return hashlib.sha256(self._model).digest()

    def prepare(self, text: str) -> str:
        """The text itself."""
        return text

    def token_id(self, token: str) -> int | None:
        """Id of an entry."""
        index = int(self._processor.PieceToId(token))
        is_known = index != self._processor.unk_id() or token == self._processor.IdToPiece(index)
        return index if is_known else None

    def token(self, index: int) -> str:
        """Entry of an id."""
        return str(self._processor.IdToPiece(index))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return list(self._processor.EncodeAsIds(text))

    def entries(self, text: str) -> list[str]:
        """Entries of a text."""
        return list(self._processor.EncodeAsPieces(text))

    def to_text(self, tokens: Sequence[str], special: Container[str]) -> str:
        """Text of entries and special tokens."""
        text, after_special = "", False
        plain: list[str] = []
        for token in tokens:
            if token in special:
                text += "" if after_special else " "
                text += self._join(plain) + token
                plain = []
            else:
                plain.append(token)
            after_special = token in special
        return text + self._join(plain)

    def _join(self, entries: list[str]) -> str:
        return str(self._processor.DecodePieces(entries)) if entries else ""


class LlamaVocabulary(InternLM2Vocabulary):
    """Sentencepiece as the Llama tokenizer uses it.

    With `legacy` the model's own dummy prefix acts at the start of every text between added tokens. Without it
    the whole text gets one word mark in front, and a blank after an added token stays a blank.

    Args:
        model: bytes of `tokenizer.model`.
        legacy: see above.
        adds_prefix: a word mark belongs in front (not legacy), and is dropped when decoding (both).
        unknown: the unknown token; text that starts with a blank is encoded after it, so that sentencepiece
            does not mistake the blank for its own.
    """

    def __init__(self, model: bytes, *, legacy: bool, adds_prefix: bool, unknown: str) -> None:
        super().__init__(model if legacy else model + _NO_DUMMY_PREFIX)
        self._options = (model, legacy, adds_prefix, unknown)
        self._legacy = legacy
        self._adds_prefix = adds_prefix
        self._guard = unknown
        self._guard_length = len(self._processor.EncodeAsIds(unknown))
        self.opening = WORD_MARK if adds_prefix and not legacy else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_llama, self._options

    def digest(self) -> bytes:
        """Digest of the model file and the options."""
        options = repr((self._legacy, self._adds_prefix, self._guard)).encode()
        return hashlib.sha256(super().digest() + options).digest()

    def prepare(self, text: str) -> str:
        """With a word mark in front, unless legacy or empty."""
        if self._legacy or not text:
            return text
        return self.opening + text.replace(WORD_MARK, " ")

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        if self._legacy or not text.startswith((WORD_MARK, " ")):
            return super().encode(text)
        return super().encode(self._guard + text)[self._guard_length :]

    def entries(self, text: str) -> list[str]:
        """Entries of a text."""
        if self._legacy or not text.startswith((WORD_MARK, " ")):
            return super().entries(text)
        return super().entries(self._guard + text)[self._guard_length :]

    def to_text(self, tokens: Sequence[str], special: Container[str]) -> str:
        """Text of entries and special tokens; the word mark in front is dropped."""
        entries = list(tokens)
        if self._adds_prefix and entries[0].startswith(WORD_MARK):
            entries[0] = entries[0][1:]
        text, after_special = "", False
        plain: list[str] = []
        for place, entry in enumerate(entries):
            if entry in special:
                text += " " if self._legacy and place and not after_special else ""
                text += self._join(plain) + entry
                plain = []
            else:
                if after_special and place == 1 and self._adds_prefix and not entry.startswith(WORD_MARK):
                    text += " "
                plain.append(entry)
            after_special = entry in special
        return text + self._join(plain)


def _restore_llama(model: bytes, legacy: bool, adds_prefix: bool, unknown: str) -> LlamaVocabulary:
    return LlamaVocabulary(model, legacy=legacy, adds_prefix=adds_prefix, unknown=unknown)


def read_sentencepiece(path: Path) -> bytes:
    """Bytes of a sentencepiece model that loads.

    Raises:
        CheckpointError: absent, or not such a model.
    """
    try:
        model = read_plain(path, max_bytes=MAX_JSON_BYTES)
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(model)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the tokenizer of the checkpoint needs it") from None
    except (OSError, RuntimeError, ValueError) as error:  # its own messages may be no UTF-8
        raise CheckpointError(f"{path}: not a sentencepiece model ({error})") from None
    return model
