"""MMMU's reading of open answers, and POPE's of yes and no."""

from __future__ import annotations

import re
from collections.abc import Sequence

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_COMMA_NUMBER = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN_NUMBER = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")

Normal = str | float


def mmmu_open_is_correct(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an open answer holds a gold text or equals a gold number (Yue et al., MMMU, 2024).

    Args:
        prediction: raw answer.
        answers: gold; any counts.
    """
    wanted: list[Normal] = [value for answer in answers for value in _normal(answer)]
    for said in mmmu_readings(prediction):
        if isinstance(said, str):
            if any(isinstance(value, str) and value in said for value in wanted):
                return True
        elif said in wanted:
            return True
    return False


def mmmu_readings(prediction: str) -> list[Normal]:
    """What an answer may mean: the tails after words as `is` and `answer`, and every number in it.

    Example: `mmmu_readings("The answer is 1,200 m.")` holds "1,200 m", 1200.0, and (as published) 200.0.
    """
    text = prediction.strip().strip(".").lower()
    *parts, last = text.split("\n")
    tails = [_shortest_tail(part) for part in parts] + [_shortest_tail(last, ("=", *_INDICATORS))]
    tails = [tail for tail in tails if tail] or [text]
    found = [*tails, *(number for tail in tails for number in _numbers(tail))]
    values: list[Normal] = []
    for item in found:
        values += [value for value in _normal(item) if value not in values]
    return values


def _shortest_tail(text: str, indicators: Sequence[str] = _INDICATORS) -> str:
    """What follows an indicator word, the shortest of several; empty where there is none."""
    tails = [text.rsplit(word, 1)[1].strip() for word in indicators if word in text]
    tails = [tail for tail in tails if tail not in ("", ":", ",", ".", "!", "?", ";", "'")]
    return min(tails, key=len, default="")


def _numbers(text: str) -> list[str]:
    return [*_COMMA_NUMBER.findall(text), *_SCIENTIFIC.findall(text), *_PLAIN_NUMBER.findall(text)]


def _normal(text: str) -> list[Normal]:
    """A number rounded to two digits, or lower case text; a single letter with blanks around, so that it is a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def pope_says_yes(prediction: str) -> bool:
    """POPE's reading (Li et al., 2023): `no` or `not` in the first sentence is no, everything else is yes.

    So an empty answer is a yes.
    """
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return not ({"No", "not", "no"} & set(words))
