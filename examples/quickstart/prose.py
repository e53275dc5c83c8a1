"""Real prose without a download: the language reference that ships with Python, as a stream of words.

    pydoc_data.topics -> paragraphs that read as prose -> train words | held-out words (of held-out topics)

The text changes a little between Python versions; nothing here depends on its exact wording.
"""

from __future__ import annotations

import re
from pydoc_data.topics import topics
from typing import Literal

Split = Literal["train", "held_out"]
MARK = "needle"
"""The fixed word beside the image that the question asks for; it never occurs in the prose."""

_WORD = re.compile(r"[\"'(]?[A-Za-z][A-Za-z'-]*[\")]?[.,;:?!]?")
_HELD_OUT_EVERY = 5


def split_topics(split: Split) -> list[str]:
    """Names of the topics of one split: every fifth is held out, so no text is shared between splits."""
    names = sorted(topics)
    held_out = set(names[::_HELD_OUT_EVERY])
    return [name for name in names if (name in held_out) == (split == "held_out")]


def prose_words(split: Split) -> list[str]:
    """Words of one split in reading order, punctuation attached.

    Topics quote each other, so a paragraph counts once, and training leaves out every paragraph that shares a
    sentence with a held-out topic.
    """
    paragraphs = _paragraphs(split)
    if split == "train":
        held_out = {sentence for paragraph in _paragraphs("held_out") for sentence in _sentences(paragraph)}
        paragraphs = [text for text in paragraphs if held_out.isdisjoint(_sentences(text))]
    return [
        word
        for paragraph in paragraphs
        for word in paragraph.split()
        if word.isascii() and MARK not in word.lower()
    ]


def _paragraphs(split: Split) -> list[str]:
    """Different paragraphs of prose, blanks made single, in reading order."""
    candidates = (text.split() for name in split_topics(split) for text in topics[name].split("\n\n"))
    return list(dict.fromkeys(" ".join(words) for words in candidates if _is_prose(words)))


def _sentences(paragraph: str) -> list[str]:
    """Sentences long enough to be a quotation and not an idiom."""
    return [sentence for sentence in re.split(r"[.:] ?", paragraph) if len(sentence.split()) >= 8]


def _is_prose(words: list[str]) -> bool:
    """Distinguish sentences from grammar rules, tables and code: nearly every word must look like a word."""
    return len(words) >= 8 and sum(bool(_WORD.fullmatch(word)) for word in words) >= 0.85 * len(words)
