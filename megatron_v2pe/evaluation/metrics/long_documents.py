"""MMLongBench's readings of an answer (Wang et al., 2025): each returns the score of one text, 0..1."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

_UNITS = (
    "kg",
    "meters",
    "acres",
    "minutes",
    "miles",
    "mile",
    "feet",
    "million",
    "thousand",
    "billion",
    "mm",
    "m",
)
_MOST_DIGITS = 18
_NUMBER = re.compile(r"-?\d+(?:\.\d*)?|-?\.\d+")
# Addresses, file names, pages, times, dates: right only when they are in the answer letter by letter.
_LITERAL = re.compile(
    r"https://|.*\.(?:py|ipynb)$|^page|^\d+(?:-\d+|\s\d+)?$|a\.m\.|p\.m\."
    r"|^\d{4}[-/\s]\d{1,2}[-/\s]\d{1,2}$|^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$|^\d{4}[-/\s]\d{1,2}$"
    r"|^[\w.%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$"
)


def plain(text: str, *, with_punctuation: bool = False) -> str:
    """Lower case, without articles and (by default) punctuation, blanks made single."""
    text = text.lower()
    if not with_punctuation:
        text = "".join(letter for letter in text if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(text: str, answer: Any) -> float:
    """Whether a gold answer, or one of several, is in the text."""
    answers = answer if isinstance(answer, list) else [answer]
    return float(any(plain(str(item)) in plain(text) for item in answers))


def same_sum(text: str, answer: list[int]) -> float:
    """Whether the numbers of the last list, or all numbers where there is none, have the gold's sum."""
    return float(sum(_counted(text)) == sum(answer))


def _counted(text: str) -> list[int]:
    for pattern in (r"\[[\d\s,]+\]", r"\[.*?\]"):
        found = re.findall(pattern, text, re.DOTALL)
        if found:
            try:
                items = json.loads(found[-1])
                return _whole_numbers(text for item in items if (text := str(item).strip()).isdecimal())
            except (ValueError, RecursionError):  # RecursionError: an answer of brackets
                continue
    return _whole_numbers(re.findall(r"\d+", text))


def _whole_numbers(texts: Iterable[str]) -> list[int]:
    """Numbers of an answer; one that is too long to be read, as a model may repeat a digit, counts as -1."""
    return [int(text) if len(text) <= _MOST_DIGITS else -1 for text in texts]


def letter(text: str, answer: int) -> float:
    """Whether the option is right: after `answer is` or `answer:`, else the last free-standing letter."""
    text = " ".join(text.split())
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])"):
        found = re.search(pattern, text)
        if found:
            return float(ord(found.group(1)) - ord("A") == answer)
    alone = re.findall(r"\b[A-J]\b", text)
    return float(bool(alone) and ord(alone[-1]) - ord("A") == answer)


def class_number(text: str, answer: int) -> float:
    """Whether the number of a class is right: after `label:`, else the last number."""
    text = " ".join(text.split())
    named = re.search(r"label:\s*(\d+)", text, re.IGNORECASE)
    numbers = [named.group(1)] if named else re.findall(r"\b\d+\b", text)
    return float(_whole_numbers(numbers[-1:]) == [answer])


def yes_or_no(text: str, answer: str, *, default: int | None = None) -> float:
    """Whether the last `yes` or `no` is right.

    Args:
        text: answer.
        answer: gold, yes or no.
        default: what counts where neither is said, 1 for yes; None is wrong.
    """
    said = re.findall(r"\b(yes|no)\b", plain(text, with_punctuation=True))
    value = int(said[-1] == "yes") if said else default
    return float(value == int("yes" in answer.lower()))


def document_answer(text: str, answer: Any, kind: str) -> float:
    """Score of an answer about a document.

    Args:
        text: answer.
        answer: gold; of a list its json text.
        kind: `Integer` and `Float` (a number in the answer, the latter within 1 % and up to a factor of 100), `String`
            and `None` (F1 of words, or literally where it is an address, a page, a time or a date), `List` (mean
            over its items, where free texts count as one).

    Raises:
        ValueError: another kind.
    """
    if kind in ("Integer", "Float"):
        gold, said = float(_bare(str(answer))), _numbers(_bare(text))
        if kind == "Integer":
            return float(gold in said)
        near = (gold / 100, gold, gold * 100)
        return float(any(math.isclose(value, number, rel_tol=0.01) for number in said for value in near))
    if kind in ("String", "None"):
        return float(str(answer) in text) if _LITERAL.search(str(answer)) else _f1(text, str(answer))
    if kind != "List":
        raise ValueError(f"answer_format is {kind!r}, but must be Integer, Float, String, None or List")
    items = json.loads(answer) if isinstance(answer, str) else answer
    free = [
        item
        for item in items
        if isinstance(item, str) and _kind(item) == "String" and not _LITERAL.search(item)
    ]
    parts = [*([" ".join(free)] if free else []), *(item for item in items if item not in free)]
    return sum(document_answer(text, part, _kind(part)) for part in parts) / len(parts)


def _kind(value: Any) -> str:
    if isinstance(value, int):
        return "Integer"
    if isinstance(value, float):
        return "Float"
    try:
        number = float(_bare(value))
    except ValueError:
        return "String"
    return "Integer" if number == int(number) and "%" not in value else "Float"


def _bare(text: str) -> str:
    """Without thousands' commas, units at the end, quotes and signs of currency."""
    text = text.lower().strip().replace(",", "")
    for unit in _UNITS:
        text = text.removesuffix(unit).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    for sign in ("$", "\N{POUND SIGN}", "%"):
        text = text.strip(sign).strip()
    return text


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(text)]


def _f1(text: str, answer: str) -> float:
    said, gold = plain(text).split(), plain(answer).split()
    same = sum((Counter(said) & Counter(gold)).values())
    return 2 * same / (len(said) + len(gold)) if same else 0.0


METRICS: dict[str, Callable[..., float]] = {
    "contains": contains,
    "sum": same_sum,
    "letter": letter,
    "class": class_number,
    "yes": yes_or_no,
    "document": document_answer,
}
