"""The paper's and the model card's tables with our numbers in them, and what keeps a number from being matched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.jobs.identity import MANIFEST
from megatron_v2pe.evaluation.jobs.report import read_scores
from megatron_v2pe.evaluation.paper.numbers import COLUMNS, Column


@dataclass(frozen=True, kw_only=True)
class OwnNumber:
    """One of our numbers, in percent.

    Attributes:
        value: the number.
        settings: how it was made, in words.
        folder: of its rows.
        is_complete: every question has an answer and all questions were asked.
    """

    value: float
    settings: str
    folder: str
    is_complete: bool


def own_numbers(folders: Sequence[Path]) -> dict[str, list[OwnNumber]]:
    """Our numbers by the title of their column, one for each stride of each folder.

    Raises:
        ConfigError: a folder has no scores.
    """
    found: dict[str, list[OwnNumber]] = {}
    for folder in folders:
        scores = read_scores(folder)
        manifest = _manifest(folder)
        for column in COLUMNS:
            if column.benchmark == scores.get("benchmark"):
                found.setdefault(column.title, []).extend(_numbers(column, scores, manifest, folder))
    return found


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    return json.loads(path.read_bytes()) if path.exists() else {}


def _numbers(
    column: Column, scores: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path
) -> list[OwnNumber]:
    numbers = []
    try:
        for stride, values in scores["strides"].items():
            metrics = values["metrics"]
            value = metrics.get(column.metric) if column.metric else next(iter(metrics.values()), None)
            if value is None:
                continue
            limits = [f"first {manifest['limit']} of each set"] if manifest.get("limit") else []
            limits += [f"sets {', '.join(manifest['sets'])}"] if manifest.get("sets") else []
            words = [f"stride {stride}", f"mode {scores['mode']}", manifest.get("settings", ""), *limits]
            numbers.append(
                OwnNumber(
                    value=100 * value,
                    settings=", ".join(word for word in words if word),
                    folder=str(folder),
                    is_complete=not values["errors"] and not values["missing"] and not limits,
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: scores.json is damaged ({error!r}); score the folder again") from None
    return numbers


def paper_table(folders: Sequence[Path]) -> str:
    """Text of the table.

    Raises:
        ConfigError: a folder has no scores.
    """
    ours = own_numbers(folders)
    head = ["benchmark", "ours", "card", "paper", "InternVL2-2B", "our settings"]
    lines = [head]
    for column in COLUMNS:
        published = [_shown(value) for value in column.published]
        found: list[OwnNumber | None] = list(ours.get(column.title, []))
        for number in found or [None]:
            if number is None:
                lines.append([column.title, "-", *published, "not evaluated"])
            else:
                mark = "" if number.is_complete else "*"
                lines.append([column.title, f"{number.value:.1f}{mark}", *published, number.settings])
    widths = [max(len(line[index]) for line in lines) for index in range(len(head) - 1)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)
        ]
        text.append("  ".join([*cells, line[-1]]))
    text.insert(1, "-" * max(map(len, text)))
    notes = [f"{column.title}: {column.caveat}" for column in COLUMNS if column.caveat]
    text += ["", "* not all questions: limited, some sets, or with errors", ""]
    text += ["card: InternVL2-V2PE-32K as released; paper: the model of the paper, which has other numbers."]
    text += ["What keeps a number from being matched exactly:", *(f"  {note}" for note in notes)]
    return "\n".join(text)


def card_bars(folders: Sequence[Path]) -> tuple[dict[str, float], dict[str, float]]:
    """(ours, card's) in percent by title, of columns that both have; the best of our strides."""
    ours = {
        title: max(n.value for n in numbers) for title, numbers in own_numbers(folders).items() if numbers
    }
    card = {column.title: column.card for column in COLUMNS if column.card is not None}
    shown = {title: value for title, value in ours.items() if title in card}
    return shown, {title: card[title] for title in shown}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
