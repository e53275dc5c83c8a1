r"""The answer normaliser of the VQA challenge, which MM-NIAH, MileBench, TextVQA and Long-VQA build on.

    "The  two-Dogs."  --lower case, separators-->  "the  two dogs"  --number words, articles-->  "2 dogs"

Antol et al., VQA (2015); the EvalAI server's version of it. Quirks of the published code change recorded scores, so
they are kept and named: the number table (`NUMBERS_TO_TEN`, `NUMBERS_TO_NINETY`); a period is only taken out where no
digit follows and at most 32 times (the flag `re.UNICODE`, 32, is passed where the count belongs); and the lookaround
`(?!<=\d)`, which is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def listed(text: str) -> list[str]:
    """Words of a text, for tables that are easier to read without quotes."""
    return text.split()


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
_MAX_PERIODS = int(re.UNICODE)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = ("a", "an", "the")

NUMBERS_TO_TEN: Mapping[str, str] = {
    name: str(value)
    for value, name in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}  # as in the VQA challenge; MM-NIAH's own table has no "none" and more numbers
NUMBERS_TO_NINETY: Mapping[str, str] = (
    {name: digits for name, digits in NUMBERS_TO_TEN.items() if name != "none"}
    | {
        name: str(value)
        for value, name in enumerate(
            [
                "eleven",
                "twelve",
                "thirteen",
                "fourteen",
                "fifteen",
                "sixteen",
                "seventeen",
                "eighteen",
                "nineteen",
                "twenty",
            ],
            11,
        )
    }
    | {
        name: str(value * 10)
        for value, name in enumerate(listed("thirty forty fifty sixty seventy eighty ninety"), 3)
    }
)

# Written without (all of) their apostrophes, contractions get them back.
_CONTRACTED = listed(
    """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
)


def _spellings(word: str) -> list[str]:
    """What the published table lists for a word: without apostrophes, or with one of several."""
    if word.count("'") < 2:
        return [word.replace("'", "")]
    places = [index for index, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


_CONTRACTIONS = {spelling: word for word in _CONTRACTED for spelling in _spellings(word)}
_CONTRACTIONS |= {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}


def strip_punctuation(text: str) -> str:
    """Take out or blank each mark: out where the text has it beside a blank, or has a comma between digits at all."""
    out = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or has_number else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def strip_words(text: str, *, numbers: Mapping[str, str]) -> str:
    """Lower case; number words as digits, no articles, contractions with their apostrophes, single blanks."""
    tokens = [numbers.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in tokens if word not in _ARTICLES)


def vqa_normal(text: str, *, numbers: Mapping[str, str] = NUMBERS_TO_TEN) -> str:
    """The whole normaliser.

    Example: `vqa_normal("The two dogs.")` is "2 dogs".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return strip_words(strip_punctuation(text), numbers=numbers)


def has_word(text: str, word: str) -> bool:
    """Whether `word` occurs in `text` between word boundaries."""
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def vqa_soft_accuracy(
    prediction: str, answers: list[str], *, normal: Callable[[str], str] = vqa_normal
) -> float:
    """Accuracy against the answers of people: mean over leave-one-out subsets of min(1, matches / 3).

    A single distinct answer scores 1 when it is met (so does one person's only answer).

    Args:
        prediction: what the model said.
        answers: of ten people, or the only one.
        normal: normaliser of both sides.
    """
    given = [normal(answer) for answer in answers]
    said = normal(prediction)
    if len(set(given)) == 1:
        return float(said == given[0])
    total = 0.0
    for left_out in range(len(given)):
        others = given[:left_out] + given[left_out + 1 :]
        total += min(1.0, others.count(said) / 3)
    return total / len(given) if said in given else 0.0
