"""Which option an answer names: the published rules of multiple choice benchmarks, each under its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from megatron_v2pe.evaluation.metrics.vqa_text import strip_punctuation

LetterRule = Literal["release", "single", "fork"]
_ESCAPED = frozenset("\\.^$*+?{}[]|()")
LETTER_RULES: tuple[LetterRule, ...] = ("release", "single", "fork")


def letter_of(index: int) -> str:
    """A, B, ..., Z, AA, AB, ...: the letter of an option."""
    return chr(65 + index) if index < 26 else letter_of(index // 26 - 1) + chr(65 + index % 26)


def milebench_text(text: str) -> str:
    """MileBench's normaliser: no punctuation, no quotes at the ends, lower case."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return strip_punctuation(text).strip("'").strip('"').strip().lower()


def milebench_choice(text: str, choices: Sequence[str], *, rule: LetterRule) -> str:
    """Letter that an answer names, by MileBench's order of rules (Song et al., MileBench, 2024).

        "b took the dish" letter with its text -> "took the dish" text alone -> a letter by `rule` -> all option letters

    The third step was changed over time, and the versions differ by tens of points on models that explain themselves:

        release  the whole answer is an option's letter
        single   exactly one free-standing A, B, C or D
        fork     the answer begins with a, b, c or d (`cars` is C)

    Args:
        text: answer, normalised by `milebench_text`.
        choices: options, normalised alike.
        rule: the third step.

    Returns:
        The letter; several letters or none where nothing matched; C for an empty answer.
    """
    if text == "":
        return "C"
    letters = {letter_of(index): choice for index, choice in enumerate(choices)}
    found = _first(text, [milebench_text(f"{letter} {choice}") for letter, choice in letters.items()])
    if found is not None:
        return found[:1].upper()
    bare = {letter: milebench_text(choice).replace(" ", "") for letter, choice in letters.items()}
    found = _first(text.replace(" ", ""), list(bare.values()))
    # The published code compares what it found with an escaped pattern, so that an option with one of these marks
    # (`0.02`, `$5`) is never met by its text; recorded scores depend on it.
    if found is not None and not set(found) & _ESCAPED:
        return next(letter for letter, choice in bare.items() if choice == found)
    return _lone_letter(text.upper(), letters, rule) or "".join(
        letter.upper() for letter in text if letter.upper() in letters
    )


def _first(text: str, options: Sequence[str]) -> str | None:
    """The option that occurs first in the text; of several at one place the first listed."""
    found = re.search("|".join(re.escape(option) for option in options), text)
    return None if found is None else found.group(0)


def _lone_letter(text: str, letters: dict[str, str], rule: LetterRule) -> str | None:
    if rule == "release":
        return text if len(text) <= 2 and text in letters else None
    if rule == "single":
        found = re.findall(r"\b[A-D]\b", text)
        return found[0] if len(found) == 1 else None
    begins = re.match(r"[A-D]", text.strip())
    return begins.group(0) if begins else None


def internvl_choice(text: str, options: dict[str, str]) -> str:
    """InternVL's rule for ScienceQA, MMBench and MMMU: the answer, its first letter, or an option's text in it.

    Args:
        text: raw answer.
        options: text of each option by its letter.

    Returns:
        A letter, or the answer as it is; an empty answer stays empty (the release ends with an IndexError).
    """
    text = text.strip()
    if len(text) <= 1:
        return text
    if text[0] in options:
        return text[0]
    return next((letter for letter, option in options.items() if option in text), text)


def clean_choice(text: str, letters: Sequence[str]) -> str:
    """The one option that an answer names, or nothing: `B`, `b.`, `(B) banana`, `**B**`, `The answer is B`.

    Stricter than the published rules: a letter must be the first word of the answer, or of what follows
    `answer is` or `answer:`.

    Args:
        text: raw answer.
        letters: of the options.
    """
    text = re.sub(r"[*`]", "", text).strip()
    after = re.search(r"(?i)(?:answer|option)(?:\s+is|:)\s*(.*)", text, re.DOTALL)
    found = re.match(r"\(?([A-Za-z])(?![A-Za-z'])", (after.group(1) if after else text).lstrip())
    if found is None or found.group(1).upper() not in letters:
        return ""
    # "A dog" begins with an article, not with an option.
    if found.group(1) in ("A", "a", "I") and re.match(r"\(?[AaI] [a-z]", text):
        return ""
    return found.group(1).upper()


def mvbench_is_correct(text: str, gold: str) -> bool:
    """MVBench's rule (Li et al., 2024): the answer's first word and the gold `(x)` contain one another.

    An empty answer counts as right in it, as the empty text is in every text.

    Args:
        text: raw answer.
        gold: `(A) text of the option`.
    """
    said = text.replace("Answer: ", "").lower().split(" ")[0]
    option = gold.lower().split(" ")[0]
    return said.replace(".", "") in option or option in said


def videomme_choice(text: str) -> str:
    """Video-MME's rule (Fu et al., 2024): phrases like `The answer is` out, then the first of A, B, C, D."""
    text = text.strip()
    for phrase in (
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option is",
        "The correct option is",
        "Best answer:",
        "Best option:",
        "Answer:",
        "Option:",
    ):
        text = text.replace(phrase, "")
    if len(text.split()) > 10 and not re.search("[ABCD]", text):
        return ""
    found = re.search("[ABCD]", text)
    return found.group(0) if found else ""
