"""What the V2PE release does to both sides of a Long-VQA answer before it scores them.

    "Two dogs are Running."  -> "2 dog are run"       "45 %" -> "45"       "3/4" -> "0.75"       "[12 km]" -> "12 km"

The release reads two word lists of nltk (English words, WordNet's noun forms), which this package does not download:
`Lexicon` holds them where a user has them, and without one the two steps that need it are left out and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_v2pe.evaluation.metrics.vqa_text import listed

_NUMBERS = {
    name: str(value)
    for value, name in enumerate(
        listed(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty"
        )
    )
}
_FREE_TASKS = frozenset(
    listed("chartqa clevr deepform okvqa dvqa gqa infovqa ocrvqa visualmrc vizwiz wikitablequestions")
)


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """English, as nltk has it.

    Attributes:
        words: every form of the list `words`.
        singular: lower case noun -> its lemma.
    """

    words: frozenset[str]
    singular: Callable[[str], str]


def nltk_lexicon() -> Lexicon | None:
    """The release's two lists, if nltk and its data are installed; None otherwise."""
    try:
        from nltk.corpus import words
        from nltk.stem import WordNetLemmatizer

        lemmatizer = WordNetLemmatizer()
        lemmatizer.lemmatize("dogs", "n")  # raises where the data is not there
        return Lexicon(
            words=frozenset(words.words()), singular=lambda word: str(lemmatizer.lemmatize(word, "n"))
        )
    except (ImportError, LookupError):
        return None


def rectify(task: str, text: str, *, lexicon: Lexicon | None = None) -> str:
    """One side of a Long-VQA answer as the release compares it.

    Args:
        task: set of Long-VQA, as `chartqa`.
        text: prediction or answer.
        lexicon: for the steps on `-ing` and plurals; None leaves them out, except that plurals' step lowers case.
    """
    text = text.strip().strip(".")
    if task == "svqa":
        text = text[0] if text[:1] in tuple("ABCD") and text else text
    elif task == "tabfact":
        text = _yes_or_no(text)
    elif task in _FREE_TASKS:
        text = _yes_or_no(text)
        text = " ".join(_NUMBERS.get(word.lower(), word) for word in text.split(" "))
        text = re.sub(r"(?<=\d),(?=\d)", "", text)
        text = _without_unit(text)
        text = text.removesuffix("%")
        text = text.strip("[").strip("]").strip("(").strip(")").strip("{").strip("}")
        if lexicon is not None:
            text = " ".join(_without_ing(word, lexicon.words) for word in text.split(" "))
            text = " ".join(lexicon.singular(word.lower()) for word in text.split(" "))
        text = _fraction(text.lower())
    return text.strip()


def _yes_or_no(text: str) -> str:
    for word in ("Yes", "No"):
        if text.startswith((word, word.lower())):
            return word
    return text


def _without_unit(text: str) -> str:
    found = re.match(r"^([0-9]+\.?[0-9]*)\s+[A-Za-z\s]+$", text, re.DOTALL)
    return found.group(1) if found else text


def _without_ing(word: str, words: frozenset[str]) -> str:
    root = word[:-3].lower()
    if not word.endswith("ing") or len(root) <= 1:
        return word
    if root in words:
        return root
    if root[-1] == root[-2] and root[:-1] in words:
        return root[:-1]
    return f"{root}e" if f"{root}e" in words else word


def _fraction(text: str) -> str:
    for mark in (":", "/"):
        parts = text.split(mark)
        if len(parts) != 2:
            continue
        try:
            return str(float(parts[0]) / float(parts[1]))
        except (ValueError, ZeroDivisionError):
            continue
    return text
