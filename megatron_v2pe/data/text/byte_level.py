"""Byte pair encoding by the `tokenizers` library: Qwen2's two text files, or a tokenizer.json.

    text --NFC--> words (one regular expression) --UTF-8 bytes as letters--> merges --> ids

Each byte has a letter of its own, so any text can be encoded and no text has an unknown token. The library keeps a few
hundred bytes for every token of a text until it is done with it, so long texts are encoded block by block.

A tokenizer.json may also hold the pairs of a sentencepiece vocabulary (native folders of InternLM2 and InternLM3),
where a blank is a mark and a character without an entry becomes its bytes: `MetaspaceVocabulary`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_v2pe.core.errors import CheckpointError, DataError
from megatron_v2pe.core.plain_files import read_plain_text
from megatron_v2pe.data.text.tokenizer_files import read_json, token_index

# How Qwen2 cuts words. Its files do not hold the expression: contractions, letters with one leading sign, single
# digits, signs with their line breaks, line breaks, blanks.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama-3's differ in the digits. Both end a word at every line break that has no other blank beside it.
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_LINE_END = re.compile(r"[\w!-~]\n(?=[\w!-~])")
_BLOCK_CHARS = 2**16
_METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}


class ByteLevelVocabulary:
    """A byte-level vocabulary; see `Vocabulary` for the methods.

    Args:
        backend: the library's tokenizer.
        composes: texts are brought to Unicode's composed form (NFC) first, as Qwen2's tokenizer does.
        digest: identity of all that decides ids.
    """

    joiner = ""
    opening = ""

    def __init__(self, backend: tokenizers.Tokenizer, *, composes: bool, digest: bytes) -> None:
        self._backend = backend
        self._composes = composes
        self._digest = digest
        self._decoder = decoders.ByteLevel()
        self.size = int(backend.get_vocab_size(with_added_tokens=False))
        self._ends_at_lines = _ends_words_at_lines(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._backend, self._composes, self._digest)

    def digest(self) -> bytes:
        """Digest of the description and the switch."""
        return self._digest

    def prepare(self, text: str) -> str:
        """The text itself."""
        return text

    def token_id(self, token: str) -> int | None:
        """Id of an entry."""
        index = self._backend.token_to_id(token)
        return None if index is None else int(index)

    def token(self, index: int) -> str:
        """Entry of an id."""
        return str(self._backend.id_to_token(index))

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for block in self._cut(text):
            ids += self._encoded(block).ids
        return ids

    def entries(self, text: str) -> list[str]:
        """Entries of a text, one letter for each byte."""
        return list(self._encoded(text).tokens)

    def _encoded(self, text: str) -> tokenizers.Encoding:
        """The library's result.

        Raises:
            DataError: the expression that cuts words gives up on the text; the library then ends in a panic.
        """
        try:
            return self._backend.encode(self._composed(text), add_special_tokens=False)
        except BaseException as error:
            raise_if_foreign(error)
            raise DataError(
                f"the tokenizer cannot cut a text of {len(text):,} characters into words ({str(error)[:200]}); is it "
                "millions of blanks?"
            ) from None

    def to_text(self, tokens: Sequence[str], special: Container[str]) -> str:
        """Text of entries; bytes that are no UTF-8 become U+FFFD."""
        return str(self._decoder.decode(list(tokens)))

    def opens_with(self) -> list[int]:
        """Ids that the description puts in front of every text."""
        return list(self._backend.encode("").ids)

    def _cut(self, text: str) -> Iterator[str]:
        """A long text in blocks whose ids are, one after the other, the ids of the text."""
        start = 0
        while self._ends_at_lines and len(text) - start > _BLOCK_CHARS:
            found = _LINE_END.search(text, start + _BLOCK_CHARS)
            if found is None:
                break
            yield text[start : found.end()]
            start = found.end()
        yield text[start:] if start else text

    def _composed(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._composes else text


class MetaspaceVocabulary(ByteLevelVocabulary):
    """Byte pairs of a sentencepiece model, as a tokenizer.json describes them; blanks are marks, no prefix is added.

    Args:
        backend: the library's tokenizer, without added tokens.
        digest: identity of all that decides ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, digest: bytes) -> None:
        super().__init__(backend, composes=False, digest=digest)
        self._decoder = backend.decoder

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_metaspace, (self._backend, self._digest)


def _ends_words_at_lines(backend: tokenizers.Tokenizer) -> bool:
    """Whether a line break between two visible characters ends a word, as far as is known of the rules."""
    if backend.truncation is not None or not isinstance(backend.normalizer, normalizers.NFC | None):
        return False
    match _described(backend.pre_tokenizer):
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False},
            ]
        }:
            return pattern in (_QWEN2_WORDS, _LLAMA3_WORDS)
    return False


def _described(part: Any) -> Any:
    """A part of a tokenizer as `tokenizer.json` has it, which is what the library pickles."""
    return json.loads(part.__getstate__())


def _restore(backend: tokenizers.Tokenizer, composes: bool, digest: bytes) -> ByteLevelVocabulary:
    return ByteLevelVocabulary(backend, composes=composes, digest=digest)


def _restore_metaspace(backend: tokenizers.Tokenizer, digest: bytes) -> MetaspaceVocabulary:
    return MetaspaceVocabulary(backend, digest=digest)


def _of_description(
    backend: tokenizers.Tokenizer, description: str, *, composes: bool
) -> ByteLevelVocabulary:
    digest = hashlib.sha256(f"{composes}{description}".encode()).digest()
    return ByteLevelVocabulary(backend, composes=composes, digest=digest)


def read_qwen2(folder: Path) -> ByteLevelVocabulary:
    """Vocabulary of `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not fit each other.
    """
    vocabulary = read_json(folder / "vocab.json", required=True)
    path = folder / "merges.txt"
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{folder / 'vocab.json'}: {len(missing)} of the 256 byte letters are missing, {missing[0]!r} for one; "
            "the file is damaged or not of a byte-level tokenizer"
        )
    _check_ids(folder / "vocab.json", vocabulary)
    try:
        lines = read_plain_text(path).split("\n")
        kept = lines[1:] if lines[0].startswith("#version:") else lines
        merges = [_pair(path, line) for line in kept if line]
        _check_merges(path, merges, vocabulary)
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the tokenizer of the checkpoint needs it") from None
    except CheckpointError:
        raise
    except BaseException as error:  # the library raises its own, plain exceptions, and panics
        raise_if_foreign(error)
        raise CheckpointError(f"{path}: does not fit vocab.json ({str(error)[:300]})") from None
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return _of_description(backend, backend.to_str(), composes=True)


def read_tokenizer_json(path: Path) -> tuple[ByteLevelVocabulary, dict[str, int], frozenset[str]]:
    """Vocabulary of a `tokenizer.json`, its added tokens, and those of them that are special.

    Raises:
        CheckpointError: missing, damaged, or of a kind that is not read from this file.
    """
    values = read_json(path, required=True)
    is_byte_level = '"ByteLevel"' in json.dumps(values.get("pre_tokenizer"))
    if not is_byte_level and not _is_metaspace(values):
        raise CheckpointError(
            f"{path}: pre_tokenizer is neither ByteLevel nor Metaspace without a prefix and with bytes as fallback; "
            "tokenizers of other kinds are read from tokenizer.model (classes InternLM2Tokenizer and LlamaTokenizer)"
        )
    try:
        vocabulary = _of_byte_level(values) if is_byte_level else _of_metaspace(values)
    except BaseException as error:  # the library raises plain exceptions, and panics
        raise_if_foreign(error)
        raise CheckpointError(
            f"{path}: cannot be read by the tokenizers library ({str(error)[:300]})"
        ) from None
    entries = _added_entries(path, values.get("added_tokens") or [])
    added = {entry["content"]: entry["id"] for entry in entries}
    return vocabulary, added, frozenset(entry["content"] for entry in entries if entry.get("special"))


def _is_metaspace(values: Mapping[str, Any]) -> bool:
    """Whether a description is one of sentencepiece byte pairs: what ids depend on must be exactly this."""
    model = values.get("model")
    decoder = values.get("decoder")
    if values.get("normalizer") is not None or not isinstance(model, dict) or not isinstance(decoder, dict):
        return False
    parts = [part.get("type") for part in decoder.get("decoders") or () if isinstance(part, dict)]
    return (
        values.get("pre_tokenizer") == _METASPACE
        and (model.get("type"), model.get("byte_fallback")) == ("BPE", True)
        and not (model.get("dropout") or model.get("ignore_merges"))
        and parts == ["Replace", "ByteFallback", "Fuse"]
    )


def _of_byte_level(values: Mapping[str, Any]) -> ByteLevelVocabulary:
    """Without added tokens, as below."""
    description = json.dumps({**values, "added_tokens": []})
    return _of_description(tokenizers.Tokenizer.from_str(description), description, composes=False)


def _of_metaspace(values: Mapping[str, Any]) -> MetaspaceVocabulary:
    """Without added tokens: `Tokenizer` cuts texts at them, and where a text merely spells one, it is text."""
    description = json.dumps({**values, "added_tokens": []})
    digest = hashlib.sha256(description.encode()).digest()
    return MetaspaceVocabulary(tokenizers.Tokenizer.from_str(description), digest=digest)


def raise_if_foreign(error: BaseException) -> None:
    """Raise what is no failure of the tokenizers library, whose panics are not Exceptions."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _check_ids(path: Path, vocabulary: Mapping[str, Any]) -> None:
    for token, index in vocabulary.items():
        token_index(path, token, index)
    if set(vocabulary.values()) != set(range(len(vocabulary))):
        raise CheckpointError(
            f"{path}: the ids of its {len(vocabulary):,} entries are not 0..{len(vocabulary) - 1:,}, each once; the "
            "file is damaged"
        )


def _added_entries(path: Path, entries: Any) -> list[dict[str, Any]]:
    """`added_tokens` of a tokenizer.json, each an object with `content` and `id`."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: added_tokens must be a list of objects")
    for entry in entries:
        token_index(path, entry.get("content"), entry.get("id"))
    return entries


def _check_merges(path: Path, merges: Sequence[tuple[str, str]], vocabulary: Container[str]) -> None:
    """Every merge makes an entry; where one does not, the library would end in a panic."""
    for first, second in merges:
        if first + second not in vocabulary:
            raise CheckpointError(
                f"{path}: does not fit vocab.json, which has no entry {first + second!r} for the merge of {first!r} "
                f"and {second!r}; take both files from one checkpoint"
            )


def _pair(path: Path, line: str) -> tuple[str, str]:
    """One line of merges.txt."""
    parts = line.split()
    if len(parts) != 2:
        raise CheckpointError(f"{path}: {line[:60]!r} is not a pair of tokens; the file is damaged")
    return parts[0], parts[1]
