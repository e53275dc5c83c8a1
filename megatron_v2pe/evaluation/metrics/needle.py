"""Correctness of one MM-NIAH answer (Wang et al., Needle In A Multimodal Haystack, 2024), in three readings.

    original  the benchmark's own scorer
    release   the V2PE release's: a bare `left` or `right` is a letter, and equal texts are right before normalising
    clean     `release`, but an empty answer is never right and a counted list must have the right number of items

The answer's type says the kind of question: a whole number is an option (0 = A), a list is counted, a text is open.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from megatron_v2pe.evaluation.metrics.vqa_text import NUMBERS_TO_NINETY, has_word, vqa_normal

NeedleMode = Literal["release", "original", "clean"]


_MOST_DIGITS = 18  # Python refuses to read numbers of thousands of digits, and no option has such a number


def needle_score(answer: int | str | list[Any], response: str, *, mode: NeedleMode) -> float:
    """Score of one answer, 0..1; lists get a share, all others 0 or 1.

    Example: `needle_score([1, 2, 3], "[1, 2]", mode="release")` is 2/3; `needle_score(1, "B. banana", ...)` is 1.
    """
    response = response.strip(".")
    if mode == "clean" and not response.strip():
        return 0.0
    if isinstance(answer, list):
        return _list_score(answer, response, is_strict=mode == "clean")
    if isinstance(answer, int):
        return float(_option(response, mode) == answer)
    if mode != "original" and _first_sentence(response) == _first_sentence(answer, strip=False):
        return 1.0
    gold = vqa_normal(answer, numbers=NUMBERS_TO_NINETY)
    said = vqa_normal(response, numbers=NUMBERS_TO_NINETY)
    if mode == "clean" and not gold:  # an answer of articles only, as "A", normalises to nothing
        return 0.0
    return float(has_word(said, gold))


def _option(response: str, mode: NeedleMode) -> int | None:
    """Index of the option that a response names, None where it names none."""
    if response.isdecimal():
        return int(response) if len(response) <= _MOST_DIGITS else None
    text = _first_sentence(response)
    if text == "none":
        return None
    if "the camera is moving left" in text or (mode != "original" and text == "left"):
        text = "a"
    elif "the camera is moving right" in text or (mode != "original" and text == "right"):
        text = "b"
    return ord(text) - ord("a") if len(text) == 1 else None


def _first_sentence(text: str, *, strip: bool = True) -> str:
    """Lower case, without `the answer is` and asterisks, up to the first period (then also without commas)."""
    text = text.lower().replace("the answer is", "").replace("*", "")
    if "." in text:
        text = text.split(".")[0].replace(",", "").strip()
    return text.strip() if strip else text


def _list_score(answer: list[Any], response: str, *, is_strict: bool) -> float:
    """Share of positions with the right item; prose around the list is an unreadable answer."""
    try:
        said = json.loads(response.replace("json", "").replace("```", "").strip())
    except (ValueError, RecursionError):
        return 0.0
    if isinstance(said, dict):
        values = list(said.values())
        if not all(isinstance(value, list) for value in values):
            return 0.0
        said = [item for value in values for item in value]
    if not isinstance(said, list) or not answer:
        return 0.0
    if is_strict and len(said) != len(answer):
        return 0.0
    return sum(float(found == item) for found, item in zip(said, answer, strict=False)) / len(answer)
