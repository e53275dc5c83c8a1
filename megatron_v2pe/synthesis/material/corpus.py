"""A folder of texts as one file of passages that all workers map into memory.

    files --read_documents--> sentences --> passages of about 4,000 characters --> passages.txt + passages.npz

A passage is the unit of the split, so that a folder of one long file can be divided too. Files quote each other:
training leaves out every sentence that an evaluation passage also has. In the store sentences are lines and paragraphs
are separated by an empty line; nothing else of the source's layout is kept.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.synthesis.material.texts import TEXT_SUFFIXES, paragraphs, read_documents
from megatron_v2pe.synthesis.split import Split, digest, split_of

PASSAGE_CHARS = 4000
TEXT_FILE, INDEX_FILE = "passages.txt", "passages.npz"
_IDIOM_CHARS = 40
"""Sentences below this length may be in both splits: headings, idioms."""

Paragraphs = list[list[str]]


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a folder of texts came to.

    Attributes:
        digest: of all passages, in order.
        num_files: files read.
        num_passages: passages of both splits.
        skipped: file -> why nothing of it is used.
    """

    digest: str
    num_files: int
    num_passages: int
    skipped: dict[str, str]


def text_files(folder: Path) -> list[Path]:
    """Files of text below a folder, by path.

    Raises:
        DataError: there is no such folder, or no file of text in it.
    """
    if not folder.is_dir():
        raise DataError(
            f"--texts: {folder}: no such folder; give a folder of {', '.join(TEXT_SUFFIXES)} files"
        )
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()
    )
    if not found:
        raise DataError(f"--texts: {folder}: holds no file that ends with {', '.join(TEXT_SUFFIXES)}")
    return found


def build_corpus(
    files: Iterable[Path], *, store: Path, held_out: float, on_file: Callable[[], None]
) -> CorpusSummary:
    """Read all files once and write the store.

    Args:
        files: see `text_files`.
        store: existing folder for the two files.
        held_out: share of passages for evaluation.
        on_file: called after each file.

    Raises:
        DataError: no file has any text.
    """
    writer = _StoreWriter(store / TEXT_FILE, held_out)
    skipped: dict[str, str] = {}
    num_files = 0
    with writer:
        for path in files:
            num_files += 1
            try:
                num_passages = writer.num_passages
                for document in read_documents(path):
                    for passage in _passages(document):
                        writer.add(passage)
                if writer.num_passages == num_passages:
                    skipped[str(path)] = f"{path}: has no text"
            except DataError as error:
                skipped[str(path)] = str(error)
            on_file()
    if not writer.num_passages:
        raise DataError(
            f"--texts: none of the {num_files} files has any text: {next(iter(skipped.values()))}"
        )
    buffer = io.BytesIO()
    held_sentences = np.array(sorted(writer.held_sentences), dtype=np.uint64)
    np.savez(
        buffer,
        offsets=np.array(writer.offsets, dtype=np.int64),
        is_held_out=np.array(writer.is_held_out, dtype=bool),
        held_sentences=held_sentences,
    )
    write_atomic(store / INDEX_FILE, buffer.getvalue())
    return CorpusSummary(
        digest=writer.hash.hexdigest(),
        num_files=num_files,
        num_passages=writer.num_passages,
        skipped=skipped,
    )


def _passages(document: str) -> Iterator[Paragraphs]:
    """Consecutive sentences of a document, about PASSAGE_CHARS characters each."""
    passage: Paragraphs = []
    length = 0
    for paragraph in paragraphs(document):
        passage.append([])
        for sentence in paragraph:
            passage[-1].append(sentence)
            length += len(sentence)
            if length >= PASSAGE_CHARS:
                yield passage
                passage, length = [[]], 0
        passage = [kept for kept in passage if kept]
    if passage:
        yield passage


class _StoreWriter:
    """Appends passages to a file of its own, which gets its name when all is written."""

    def __init__(self, path: Path, held_out: float) -> None:
        self._path = path
        self._held_out = held_out
        self._aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self.offsets = [0]
        self.is_held_out: list[bool] = []
        self.held_sentences: set[int] = set()
        self.hash = hashlib.blake2b(digest_size=16)

    def __enter__(self) -> _StoreWriter:
        self._file = open(self._aside, "wb")
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None:
            os.replace(self._aside, self._path)
        else:
            self._aside.unlink(missing_ok=True)

    @property
    def num_passages(self) -> int:
        return len(self.is_held_out)

    def add(self, passage: Paragraphs) -> None:
        data = "\n\n".join("\n".join(paragraph) for paragraph in passage).encode("utf-8", "replace")
        self._file.write(data)
        self.hash.update(data + b"\0")
        self.offsets.append(self.offsets[-1] + len(data))
        is_held_out = split_of(digest(data), held_out=self._held_out) == "eval"
        self.is_held_out.append(is_held_out)
        if is_held_out:
            self.held_sentences.update(_sentence_key(text) for lines in passage for text in lines)


def _sentence_key(sentence: str) -> int:
    """64 bits of a sentence, blind to case."""
    return int.from_bytes(hashlib.blake2b(sentence.lower().encode(), digest_size=8).digest(), "little")


class Corpus:
    """Passages of one split, read from the store when they are asked for.

    Args:
        store: folder that `build_corpus` wrote.
        split: whose passages.

    Attributes:
        passages: int64 [n], numbers of the split's passages in the store.

    Raises:
        DataError: the split has no passage.
    """

    def __init__(self, store: Path, split: Split) -> None:
        with np.load(store / INDEX_FILE, allow_pickle=False) as stored:
            self._offsets: NDArray[np.int64] = stored["offsets"]
            is_held_out: NDArray[np.bool_] = stored["is_held_out"]
            self._held_sentences: NDArray[np.uint64] = stored["held_sentences"]
        self._split = split
        self.passages = np.flatnonzero(is_held_out == (split == "eval"))
        if not len(self.passages):
            raise DataError(
                f"--texts: none of the {len(is_held_out)} passages falls into split {split!r}; give more text, or "
                "change --held-out"
            )
        with open(store / TEXT_FILE, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def paragraphs(self, passage: int) -> Paragraphs:
        """Sentences of a passage, those left out that the other split has; may be empty."""
        data = self._data[self._offsets[passage] : self._offsets[passage + 1]]
        found = [block.split("\n") for block in data.decode("utf-8").split("\n\n")]
        if self._split == "eval":
            return found
        kept = ([line for line in block if not self._is_held_out(line)] for block in found)
        return [block for block in kept if block]

    def _is_held_out(self, sentence: str) -> bool:
        if len(sentence) < _IDIOM_CHARS:
            return False
        key = np.uint64(_sentence_key(sentence))
        place = int(np.searchsorted(self._held_sentences, key))
        return place < len(self._held_sentences) and bool(self._held_sentences[place] == key)
