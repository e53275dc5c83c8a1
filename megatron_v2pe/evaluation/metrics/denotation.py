"""Answers as values: WikiTableQuestions' denotation match, and the DUE benchmark's corpus F1."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

_QUOTES = (("[\u2018\u2019\u00b4`]", "'"), ("[\u201c\u201d]", '"'), ("[\u2010-\u2015\u2212]", "-"))
_CITATION = re.compile(r"((?<!^)\[[^\]]*\]|\[\d+\]|[\u2022\u2666\u2020\u2021*#+])*$")
_DETAILS = re.compile(r"(?<!^)( \([^)]*\))*$")
_QUOTED = re.compile(r'^"([^"]*)"$')


def wtq_text(text: str) -> str:
    """Pasupat and Liang's normaliser (2015): no diacritics, citations, trailing details or outer quotes; lower case."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    for pattern, plain in _QUOTES:
        text = re.sub(pattern, plain, text)
    before = None
    while text != before:
        before = text
        text = _CITATION.sub("", text.strip())
        text = _DETAILS.sub("", text.strip())
        text = _QUOTED.sub(r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


def wtq_match(prediction: str, answers: Sequence[str]) -> float:
    """Whether a prediction denotes the answer: equal texts, numbers within 1e-6, or equal dates.

    A prediction is one value, so a question with several different answers is never matched by it.
    """
    values = {_value(answer): answer for answer in answers}
    if len(values) != 1:
        return 0.0
    said, wanted = _value(prediction), next(iter(values))
    if wtq_text(prediction) == wtq_text(values[wanted]):
        return 1.0
    if isinstance(said, float) and isinstance(wanted, float):
        return float(abs(said - wanted) < 1e-6)
    return float(isinstance(said, tuple) and said == wanted)


Value = str | float | tuple[int, int, int]


def _value(text: str) -> Value:
    """A number, a date (year, month, day; -1 where unknown), or the normalised text."""
    try:
        number = float(text)
        if math.isfinite(number):
            return number
    except ValueError:
        pass
    return _date(text) or wtq_text(text)


def _date(text: str) -> Value | None:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    unknown = (("xx", "xxxx"), ("xx",), ("xx",))
    try:
        year, month, day = (
            -1 if part in words else int(part) for part, words in zip(parts, unknown, strict=True)
        )
    except ValueError:
        return None
    is_date = (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31)
    if not is_date or year == month == day == -1:
        return None
    return float(year) if month == day == -1 else (year, month, day)


def due_text(text: str) -> str:
    """The DUE evaluator's normaliser: lower case, no blanks at the ends, no final periods."""
    return text.lower().strip().rstrip(".")


def due_f1(pairs: Sequence[tuple[str, str, Sequence[str]]]) -> float:
    """Corpus F1 of the DUE benchmark (Borchmann et al., 2021) over (id, prediction, answers), one value an id.

    Precision and recall count the same matches here, so this is their common value: matches / items.
    """
    if not pairs:
        return 0.0
    matches = sum(
        due_text(prediction) in {due_text(answer) for answer in answers} for _, prediction, answers in pairs
    )
    return matches / len(pairs)
