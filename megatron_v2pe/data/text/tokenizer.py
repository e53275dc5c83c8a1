"""The checkpoint's own tokenizer, read from its files; no code of the checkpoint is executed.

    text --cut at added tokens--> [text, <img>, text, ...] --vocabulary per text--> ids

Ids and decoded strings equal those of the slow tokenizers that the release loads (InternLM2, Llama, Qwen2),
habits included: what happens to blanks at added tokens differs between them, see `vocabularies`. Blanks are never
cleaned up after decoding, as `clean_up_tokenization_spaces` is false in these checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import CheckpointError, DataError
from megatron_v2pe.data.text.byte_level import read_qwen2, read_tokenizer_json
from megatron_v2pe.data.text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from megatron_v2pe.data.text.vocabularies import (
    InternLM2Vocabulary,
    LlamaVocabulary,
    Vocabulary,
    read_sentencepiece,
)

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
_SHORT_PART, _MAX_KNOWN_PARTS = 24, 8192
_NO_MARK = 2**62  # after any text
Range = tuple[int, int]
# Added tokens that are written in texts on purpose: places of objects, as grounding data have them.
GROUNDING_TOKENS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
SUPPORTED_CLASSES = (
    "InternLM2Tokenizer",
    "InternLM3Tokenizer",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "PreTrainedTokenizerFast",
)


class Tokenizer:
    """Text to ids and back.

    Built by `load_tokenizer`. Picklable, so that loader workers can hold one.

    Args:
        vocabulary: of the text between added tokens.
        files: added tokens and roles; every special token must be among `files.added`.
        adds_bos: a text starts with the beginning-of-sequence token.

    Attributes:
        bos_id: beginning of sequence; None where the checkpoint has no such token (Qwen2).
        eos_id: end of sequence.
        pad_id: padding; the end of sequence where no token is named for it.
        image_token_id: id of `<IMG_CONTEXT>`, the token that image features replace.
        fingerprint: digest of everything that decides ids; part of the key of cached lengths.
        control_tokens: added tokens that a template, an image or the end of a text is made of; where the text of a
            record spells one, it is text (see `encode_marked`).
    """

    def __init__(self, vocabulary: Vocabulary, files: TokenizerFiles, *, adds_bos: bool) -> None:
        self._vocabulary = vocabulary
        self._files = files
        self._adds_bos = adds_bos
        self._added_by_id = {index: token for token, index in files.added.items()}
        self._known_parts: dict[
            str, list[int]
        ] = {}  # line breaks between images, roles: seen in every sample
        # Longest first, so that at one place in the text the longest added token wins.
        names = sorted(files.added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self.control_tokens = frozenset(filter(self._is_control, files.added))
        control = sorted(self.control_tokens, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, control)))
        content = [token for token in names if token not in self.control_tokens]
        self._content_splitter = (
            re.compile("(" + "|".join(map(re.escape, content)) + ")") if content else None
        )
        unknown = files.roles.get("unk_token", "")
        self._control_ids = frozenset(files.added[token] for token in control if token != unknown)
        # Added tokens that decoding sets apart from the text around them.
        self._apart = (files.added.keys() - files.special) | {
            token for token in files.additional if files.added[token] >= vocabulary.size
        }
        bos = files.roles.get("bos_token")
        self.bos_id = None if bos is None else self.token_id(bos)
        self.eos_id = self.token_id(files.roles["eos_token"])
        self.pad_id = self.token_id(files.roles.get("pad_token", files.roles["eos_token"]))
        self.image_token_id = self.token_id(IMAGE_CONTEXT)
        added = json.dumps([sorted(files.added.items()), sorted(files.strips_right), adds_bos])
        self.fingerprint = hashlib.sha256(vocabulary.digest() + added.encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._vocabulary, self._files, self._adds_bos)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return max(self._vocabulary.size, max(self._added_by_id) + 1)

    @property
    def added_tokens(self) -> frozenset[str]:
        """Tokens that are cut out of a text before the vocabulary sees it; prose must not contain them."""
        return frozenset(self._files.added)

    def _is_control(self, token: str) -> bool:
        """Special tokens and everything written `<|...|>`, but for the marks of grounding data."""
        if token in GROUNDING_TOKENS:
            return False
        is_image = token in (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)
        return is_image or token in self._files.special or (token.startswith("<|") and token.endswith("|>"))

    def control_token_in(self, text: str) -> str:
        """The first control token that a text spells; empty if it spells none."""
        found = self._control_pattern.search(text)
        return found.group() if found else ""

    def tokens_from(self, index: int) -> list[tuple[str, int]]:
        """Tokens whose id is at least `index`, with their ids, in order."""
        entries = [(self._vocabulary.token(i), i) for i in range(index, self._vocabulary.size)]
        return sorted(
            {*entries, *((t, i) for t, i in self._files.added.items() if i >= index)}, key=lambda x: x[1]
        )

    def token_id(self, token: str) -> int:
        """Id of one token.

        Raises:
            CheckpointError: the tokenizer does not know it.
        """
        index = self._files.added.get(token)
        index = self._vocabulary.token_id(token) if index is None else index
        if index is None:
            raise CheckpointError(
                f"the checkpoint's tokenizer has no token {token!r}; is this an InternVL2 checkpoint?"
            )
        return index

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of a text in which added tokens (`<img>`, `<|im_end|>`, ...) are recognised."""
        return self.encode_marked(text, (), add_bos=add_bos)[0]

    def encode_marked(
        self, text: str, marks: Sequence[int], *, add_bos: bool = True, written: Sequence[Range] = ()
    ) -> tuple[list[int], list[int]]:
        """Ids of a text, and where given places of the text lie among them.

        Args:
            text: any text; added tokens are recognised.
            marks: ascending character offsets into `text`, none inside an added token.
            add_bos: put the beginning-of-sequence token first, if the checkpoint wants one.
            written: ascending half-open character ranges in which a control token is text like any other.

        Returns:
            ids, and for each mark the number of tokens that lie wholly before it. A token that straddles
            a mark counts as after it.

        Raises:
            DataError: the vocabulary has no other ids for what one of `written` spells.
        """
        ids = [self.bos_id] if add_bos and self._adds_bos and self.bos_id is not None else []
        prepared = self._vocabulary.prepare(text)
        shift = len(prepared) - len(text)
        places: list[int] = []
        waiting = iter(marks)
        mark = next(waiting, _NO_MARK) + shift
        start = 0
        ranges = [(low + shift, high + shift) for low, high in written]
        ids_of = self._plain_ids if written else self._encode_part
        for part, num_stripped, added in self._cut(prepared, ranges):
            start += num_stripped
            end = start + len(part)
            own = [added] if added is not None else ids_of(part) if part else []
            while mark < end:
                prefix = part[: max(0, mark - start)]
                inside = _common_prefix(ids_of(prefix), own) if prefix else 0
                places.append(len(ids) + inside)
                mark = next(waiting, _NO_MARK) + shift
            ids += own
            start = end
        places += [len(ids)] * (len(marks) - len(places))
        return ids, places

    def _encode_part(self, part: str) -> list[int]:
        """Ids of a text without added tokens; short ones are remembered. The caller must not change the list."""
        if len(part) > _SHORT_PART:
            return self._vocabulary.encode(part)
        known = self._known_parts.get(part)
        if known is None:
            known = self._vocabulary.encode(part)
            if len(self._known_parts) < _MAX_KNOWN_PARTS:
                self._known_parts[part] = known
        return known

    def _plain_ids(self, part: str) -> list[int]:
        """Ids of a text, none of them a control token's.

        A vocabulary may have an entry for the id of a control token (`[UNUSED_TOKEN_145]` of InternLM2's is
        `<|im_end|>`). A text that spells it is encoded in pieces, cut after the first character of the entry.
        """
        ids = self._encode_part(part)
        if self._control_ids.isdisjoint(ids):
            return ids
        hits = self._control_ids.intersection(ids)
        spelled = [self._vocabulary.token(index) for index in hits if index < self._vocabulary.size]
        pattern = "|".join(
            re.escape(entry[0]) + "(?=" + re.escape(entry[1:]) + ")" for entry in spelled if entry
        )
        cuts = [found.end() for found in re.finditer(pattern, part)] if pattern else []
        pieces = [part[low:high] for low, high in pairwise([0, *cuts, len(part)]) if low < high]
        ids = [index for piece in pieces for index in self._vocabulary.encode(piece)]
        if not self._control_ids.isdisjoint(ids):
            names = ", ".join(self._token(index) for index in self._control_ids.intersection(ids))
            raise DataError(f"the text becomes the control token {names} of the vocabulary; change the text")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids.

        Args:
            ids: token ids. One without an entry adds no text, as in transformers: a model's vocab may be padded beyond
                its tokenizer's, and nothing keeps an untrained model from such an id.
            skip_special_tokens: omit special tokens.

        Raises:
            ValueError: an id below 0.
        """
        groups: list[str] = []  # texts, and tokens that decoding sets apart
        run: list[str] = []
        for token in map(self._token, filter(self._has_entry, ids)):
            if skip_special_tokens and token in self._files.special:
                continue
            if token in self._apart:
                groups += [text for text in [self._run_text(run)] if text]
                groups.append(token)
                run = []
            else:
                run.append(token)
        if run:
            groups.append(self._run_text(run))
        return self._vocabulary.joiner.join(groups)

    def tokenize(self, text: str) -> list[str]:
        """Vocabulary entries of a text: added tokens, and the entries of the texts between them."""
        tokens: list[str] = []
        for part, _, added in self._cut(self._vocabulary.prepare(text)):
            if part:
                tokens += [part] if added is not None else self._vocabulary.entries(part)
        return tokens

    def _pieces(self, text: str, written: Sequence[Range]) -> list[str]:
        """Texts and added tokens in turn, as `re.split` gives them; control tokens inside `written` stay text."""
        if not written:
            return self._splitter.split(text)
        parts, last = [""], 0
        for low, high, splitter in self._segments(written, len(text)):
            head, *rest = splitter.split(text[low:high]) if splitter else [text[low:high]]
            parts[-1] += head  # a text continues over the border of a segment
            parts += rest
            last = high
        return [*parts[:-1], parts[-1] + text[last:]]

    def _segments(
        self, written: Sequence[Range], end: int
    ) -> Iterator[tuple[int, int, re.Pattern[str] | None]]:
        last = 0
        for low, high in written:
            yield last, low, self._splitter
            yield low, high, self._content_splitter
            last = high
        yield last, end, self._splitter

    def _cut(self, text: str, written: Sequence[Range] = ()) -> Iterator[tuple[str, int, int | None]]:
        """Parts of a prepared text: text, number of characters stripped in front of it, id if added token."""
        parts = self._pieces(text, written)
        opening, known, strips_right = self._vocabulary.opening, self._files.added, self._files.strips_right
        strips = False
        if opening and parts[0] == opening and len(parts) > 1 and parts[1] in self._files.special:
            # No text precedes a special token, so no word mark is needed.
            yield "", len(opening), None
            parts = ["", *parts[1:]]
        for place, part in enumerate(parts):
            if not part:  # two added tokens side by side have an empty text between them
                continue
            added = known[part] if place % 2 else None
            kept = part.lstrip() if strips and added is None else part
            yield kept, len(part) - len(kept), added
            strips = added is not None and part in strips_right

    def _has_entry(self, index: int) -> bool:
        return index < self._vocabulary.size or index in self._added_by_id

    def _token(self, index: int) -> str:
        if index in self._added_by_id:
            return self._added_by_id[index]
        if not 0 <= index < self._vocabulary.size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return self._vocabulary.token(index)

    def _run_text(self, tokens: Sequence[str]) -> str:
        return self._vocabulary.to_text(tokens, self._files.special) if tokens else ""


def _restore(vocabulary: Vocabulary, files: TokenizerFiles, adds_bos: bool) -> Tokenizer:
    return Tokenizer(vocabulary, files, adds_bos=adds_bos)


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

    Reads `tokenizer_config.json`, when present `added_tokens.json` and `special_tokens_map.json`, and the
    vocabulary of the class that they name: `tokenizer.model`, `vocab.json` with `merges.txt`, or `tokenizer.json`.

    Raises:
        CheckpointError: a file is missing or damaged, the tokenizer class is not supported, or a token of
            InternVL2 is absent.
    """
    folder = Path(folder)
    files = read_tokenizer_files(folder)
    vocabulary, files, adds_bos = _read_vocabulary(folder, files)
    added = dict(files.added)
    for token in sorted(files.special - added.keys()):
        index = vocabulary.token_id(token)
        if index is None:
            raise CheckpointError(f"{folder}: the tokenizer has no id for its special token {token!r}")
        added[token] = index
    return Tokenizer(vocabulary, replace(files, added=added), adds_bos=adds_bos)


def _read_vocabulary(folder: Path, files: TokenizerFiles) -> tuple[Vocabulary, TokenizerFiles, bool]:
    """Vocabulary by class, files with the added tokens that only the vocabulary's file names, and adds_bos."""
    # A native folder that this package wrote names the class of the GitHub folder, whose vocabulary is beside it.
    kind = str(files.config.get("github_tokenizer_class") or files.config.get("tokenizer_class", ""))
    # The release loads slow tokenizers, which have the name without Fast.
    slow = kind.removesuffix("Fast")
    wants_bos = files.config.get("add_bos_token")
    if slow in ("InternLM2Tokenizer", "InternLM3Tokenizer"):  # one encoding, two names
        return (
            InternLM2Vocabulary(read_sentencepiece(folder / "tokenizer.model")),
            files,
            wants_bos is not False,
        )
    if slow == "LlamaTokenizer":
        return _read_llama(folder, files), files, wants_bos is not False
    if slow == "Qwen2Tokenizer":
        return read_qwen2(folder), files, False
    if kind == "PreTrainedTokenizerFast":
        byte_level, added, special = read_tokenizer_json(folder / "tokenizer.json")
        files = replace(files, added=added | files.added, special=files.special | special)
        return byte_level, files, bool(byte_level.opens_with())
    raise CheckpointError(
        f"{folder / 'tokenizer_config.json'}: tokenizer_class is {kind!r}; "
        f"supported: {', '.join(SUPPORTED_CLASSES)}"
    )


def _read_llama(folder: Path, files: TokenizerFiles) -> LlamaVocabulary:
    config = files.config
    return LlamaVocabulary(
        read_sentencepiece(folder / "tokenizer.model"),
        legacy=config.get("legacy") is not False,
        adds_prefix=config.get("add_prefix_space") is not False,
        unknown=files.roles.get("unk_token", "<unk>"),
    )
