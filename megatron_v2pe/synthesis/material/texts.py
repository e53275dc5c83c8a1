"""Files of text as documents, and documents as sentences.

.txt .md        the file
.html .htm      its visible text
.jsonl          `text` of each line, a document each

document -> paragraphs (blank line between) -> sentences of at most MAX_UNIT_CHARS, blanks made single
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import read_jsonl

TEXT_SUFFIXES = (".txt", ".md", ".html", ".htm", ".jsonl")
MAX_UNIT_CHARS = 240
"""Longest sentence; longer ones are cut; it bounds how far a needle can be from its depth."""

# After an end of sentence with a blank, or directly after one of the scripts that write no blanks.
_SENTENCE_END = re.compile("(?<=[.!?])\\s+(?=[\\w\"'(])|(?<=[\u3002\uff01\uff1f])")
_BLANK_LINE = re.compile(r"\n\s*\n")
_HIDDEN = frozenset({"script", "style", "head", "template", "noscript"})
_BREAKS = frozenset({"p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article"})


def read_documents(path: Path) -> Iterator[str]:
    """Documents of one file.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or a line of a jsonl file has no text.
    """
    if path.suffix.lower() == ".jsonl":
        for number, values in read_jsonl(path):
            text = values.get("text")
            if not isinstance(text, str):
                raise DataError(f"{path}:{number}: text is {text!r}, but each line needs a 'text' string")
            yield text
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    yield _visible_text(text) if path.suffix.lower() in (".html", ".htm") else text


def paragraphs(document: str) -> list[list[str]]:
    """Paragraphs of a document, each a list of sentences without line breaks; empty ones are left out."""
    found = []
    for block in _BLANK_LINE.split(document.replace("\r\n", "\n")):
        text = " ".join(block.split())
        sentences = [short for sentence in _SENTENCE_END.split(text) if sentence for short in _cut(sentence)]
        if sentences:
            found.append(sentences)
    return found


def _cut(sentence: str) -> Iterator[str]:
    """A long sentence cut at blanks, or anywhere if it has none."""
    while len(sentence) > MAX_UNIT_CHARS:
        cut = sentence.rfind(" ", 1, MAX_UNIT_CHARS)
        cut = MAX_UNIT_CHARS if cut < 0 else cut
        yield sentence[:cut]
        sentence = sentence[cut:].lstrip()
    if sentence:
        yield sentence


def _visible_text(html: str) -> str:
    reader = _TextReader()
    reader.feed(html)
    reader.close()
    return "".join(reader.parts)


class _TextReader(HTMLParser):
    """Collects text outside of hidden elements; block elements end a paragraph."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        if tag in _BREAKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN and self._hidden > 0
        if tag in _BREAKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
