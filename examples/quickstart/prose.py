"""Real prose without a download: the language reference that ships with Python, as a stream of words.

    pydoc_data.topics -> paragraphs that read as prose -> train words | held-out words (whole topics)

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
    """Words of one split in reading order, punctuation attached."""
    words: list[str] = []
    for name in split_topics(split):
        for paragraph in topics[name].split("\n\n"):
            candidate = paragraph.split()
            if _is_prose(candidate):
                words.extend(word for word in candidate if word.isascii() and MARK not in word.lower())
    return words


def _is_prose(words: list[str]) -> bool:
    """Tell sentences from grammar rules, tables and code: nearly every word must look like a word."""
    return len(words) >= 8 and sum(bool(_WORD.fullmatch(word)) for word in words) >= 0.85 * len(words)
