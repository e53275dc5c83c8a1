"""Questions of a file before the first is asked, and plain ones, without length and depth, after the last.

expected answers  --same decoding as answers-->  text, tokens: more than --max-new-tokens are refused
pictures          --headers-->                   a question whose picture is missing is not asked, its row says why
predictions       --exact, relaxed, ANLS, contains-->  scores.json, table.txt
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.evaluation.metrics.overlap import anls, exact, relaxed_correctness
from megatron_v2pe.evaluation.retrieval.questions import Prediction, RetrievalItem

logger = logging.getLogger(__name__)

METRICS: Mapping[str, Callable[[str, str], float]] = {
    "exact": lambda said, wanted: exact(said, [wanted]),
    "relaxed": relaxed_correctness,
    "anls": lambda said, wanted: anls(said, [wanted]),
    "contains": lambda said, wanted: float(_simple(wanted) in _simple(said)),
}
"""Score 0..1 of (prediction, expected answer); case counts in none of them."""
_MOST_SHOWN = 10


class Reader(Protocol):
    """Reads expected answers and pictures as the answering model does."""

    def expected(self, text: str) -> tuple[str, int]:
        """An expected answer after the decoding of answers, and its number of tokens."""

    def check_media(self, item: RetrievalItem) -> None:
        """Raises DataError where a picture is missing or cannot be used."""


def check_items(
    items: Sequence[RetrievalItem], reader: Reader, *, max_new_tokens: int
) -> tuple[list[RetrievalItem], dict[str, str]]:
    """Look at all questions before a model is loaded.

    Returns:
        The items with their expected answers decoded, and what is wrong with those that cannot be asked, by id.

    Raises:
        ConfigError: an expected answer is longer than an answer may be.
        DataError: nothing is left of an expected answer once it was decoded, or no question can be asked.
    """
    found, longest, too_long, problems = [], 0, [], {}
    for item in items:
        text, tokens = reader.expected(item.answer)
        if not text:
            raise DataError(
                f"{item.record.where}: the expected answer {item.answer[:80]!r} has special tokens only, which answers "
                "never hold"
            )
        longest = max(longest, tokens)
        if tokens > max_new_tokens:
            too_long.append((item, tokens))
        try:
            reader.check_media(item)
        except DataError as error:
            problems[item.item_id] = f"{item.record.where}: {error}"
        found.append(replace(item, answer=text))
    if too_long:
        first, tokens = too_long[0]
        raise ConfigError(
            f"--max-new-tokens is {max_new_tokens}, but {len(too_long)} of {len(items)} expected answers are longer, "
            f"the first with {tokens} tokens at {first.record.where}; give --max-new-tokens {longest} or more"
        )
    if len(problems) == len(items):
        raise DataError(
            f"none of the {len(items)} questions can be asked; the first: {next(iter(problems.values()))}; --root "
            "names the folder of the images of a jsonl file"
        )
    for text in list(problems.values())[:_MOST_SHOWN]:
        logger.warning("not asked: %s", text)
    if problems:
        logger.warning(
            "%d of %d questions cannot be asked; each is a row with its error", len(problems), len(items)
        )
    return found, problems


def remarks(predictions: Mapping[str, Sequence[Prediction]]) -> list[str]:
    """Sentences about errors and cut answers, for the end of a table."""
    lines = []
    for name, own in predictions.items():
        errors, cut = sum(bool(each.error) for each in own), sum(each.cut for each in own)
        if errors:
            lines.append(
                f"stride {name}: {errors} of {len(own)} questions ended with an error, which counts as wrong"
            )
        if cut:
            lines.append(
                f"stride {name}: {cut} of {len(own)} answers were cut at --max-new-tokens (cut: true)"
            )
    return lines


def write_plain_scores(predictions: Mapping[str, Sequence[Prediction]], *, folder: Path) -> str:
    """Write scores.json and table.txt of plain questions; returns the table. An error scores 0."""
    text = "\n".join([write_scores(predictions, folder=folder), *remarks(predictions)])
    write_atomic(folder / "table.txt", text + "\n")
    return text


def write_scores(predictions: Mapping[str, Sequence[Prediction]], *, folder: Path) -> str:
    """Write scores.json; returns its table."""
    scores = {name: _scores(own) for name, own in predictions.items()}
    write_atomic(folder / "scores.json", json.dumps(scores, indent=2) + "\n")
    header = ["stride", "questions", *METRICS, "cut", "errors"]
    rows = [
        [
            name,
            str(values["questions"]),
            *(f"{values[metric]:.3f}" for metric in METRICS),
            str(values["cut"]),
            str(values["errors"]),
        ]
        for name, values in scores.items()
    ]
    return "\n".join(text_table(header, rows))


def _scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    count = len(predictions)
    means = {
        name: sum(0.0 if each.error else metric(each.prediction, each.answer) for each in predictions) / count
        for name, metric in METRICS.items()
    }
    errors, cut = sum(bool(each.error) for each in predictions), sum(each.cut for each in predictions)
    return {"questions": count, **means, "cut": cut, "errors": errors}


def _simple(text: str) -> str:
    return " ".join(text.lower().split())
