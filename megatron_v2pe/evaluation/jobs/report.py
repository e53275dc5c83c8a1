"""From rows to scores and tables, without a model: of our own folders, and of predictions that others recorded.

OUT/rows_*.jsonl --score(mode)--> OUT/scores.json, table.txt, cells.csv, pictures
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.evaluation.benchmarks.base import MODES, Benchmark, Mode, Row, Score
from megatron_v2pe.evaluation.jobs.identity import MANIFEST, read_manifest
from megatron_v2pe.evaluation.jobs.response_rows import read_rows
from megatron_v2pe.evaluation.retrieval.report import wilson

Duplicates = Literal["refuse", "keep", "drop"]
SCORES = "scores.json"


@dataclass(frozen=True, kw_only=True)
class StrideScore:
    """Score of one stride, or of recorded predictions.

    Attributes:
        name: stride as it was asked for, or `recorded`.
        score: of the rows without errors; None where there is none.
        num_rows: rows without errors.
        errors: id and reason of each row with an error.
        missing: questions without a row.
        shape: {"n_prompt", "n_visual", "last_position"} -> largest value, 0 where not known.
    """

    name: str
    score: Score | None
    num_rows: int
    errors: dict[str, str]
    missing: int
    shape: dict[str, float]

    @property
    def is_complete(self) -> bool:
        """Every question has an answer."""
        return not self.errors and not self.missing


def chosen_mode(benchmark: Benchmark, text: str) -> Mode:
    """A mode by name; the benchmark's default for an empty one.

    Raises:
        ConfigError: the benchmark has no such mode.
    """
    found: list[Mode] = [mode for mode in MODES if mode == (text or benchmark.modes[0])]
    if not found or found[0] not in benchmark.modes:
        raise ConfigError(
            f"--mode is {text!r}, but {benchmark.name} is scored in {', '.join(benchmark.modes)}"
        )
    return found[0]


def score_folder(
    benchmark: Benchmark, path: Path, *, mode: Mode, duplicates: Duplicates = "refuse"
) -> list[StrideScore]:
    """Scores of a folder of `evaluate`, one a stride, or of recorded predictions.

    Args:
        benchmark: whose answers they are.
        path: folder, or a file of recorded predictions.
        mode: reading.
        duplicates: an id with two recorded answers is an error, counts twice, or counts once (the last).

    Raises:
        ConfigError: the folder holds another benchmark, or nothing that can be scored.
        DataError: a row cannot be read, or an id has two answers.
    """
    if (path / MANIFEST).exists():
        return _own_scores(benchmark, path, mode)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    rows = benchmark.recorded(path)
    if rows is None:
        raise ConfigError(
            f"{path}: holds neither {MANIFEST} of `evaluate --benchmark` nor predictions as {benchmark.title}'s own "
            "scripts record them"
        )
    counted = without_duplicates(rows, duplicates)
    found = _stride_score(benchmark, "recorded", counted, mode, expected=0)
    answered = [row for row in counted if row.response.error is None]
    if found.score is not None:
        notes = (*found.score.notes, *benchmark.compared(path, answered, mode))
        found = replace(found, score=replace(found.score, notes=notes))
    return [found]


def _own_scores(benchmark: Benchmark, path: Path, mode: Mode) -> list[StrideScore]:
    manifest = read_manifest(path)
    if manifest.get("benchmark") != benchmark.name:
        raise ConfigError(f"{path}: holds answers of {manifest.get('benchmark')}, not of {benchmark.name}")
    found = []
    for stride in manifest["strides"]:
        rows = [stored.row for stored in read_rows(path, stride).values()]
        found.append(_stride_score(benchmark, stride, rows, mode, expected=manifest["num_requests"]))
    return found


def without_duplicates(rows: Sequence[Row], duplicates: Duplicates) -> list[Row]:
    """Rows with at most one of an id, unless they are to be kept.

    Raises:
        DataError: there are some, and they are to be refused; names the first.
    """
    if duplicates == "keep":
        return list(rows)
    last: dict[str, Row] = {}
    for row in rows:
        if row.id in last and duplicates == "refuse":
            count = len(rows) - len({other.id for other in rows})
            raise DataError(
                f"id {row.id!r} has two answers ({count} rows too many in all); score with --duplicates keep, as the "
                "release does, or --duplicates drop, which counts the last"
            )
        last[row.id] = row
    return list(last.values())


def _stride_score(
    benchmark: Benchmark, name: str, rows: Sequence[Row], mode: Mode, *, expected: int
) -> StrideScore:
    errors = {row.id: row.response.error for row in rows if row.response.error is not None}
    answered = [row for row in rows if row.response.error is None]
    shape = {
        key: max((float(getattr(row.response, key)) for row in answered), default=0.0)
        for key in ("n_prompt", "n_visual", "last_position")
    }
    return StrideScore(
        name=name,
        score=benchmark.score(answered, mode) if answered else None,
        num_rows=len(answered),
        errors=errors,
        missing=max(0, expected - len(rows)),
        shape=shape,
    )


def as_json(benchmark: Benchmark, mode: Mode, scores: Sequence[StrideScore]) -> dict[str, Any]:
    """Everything that was computed, as json; a metric without a value is null."""
    return {
        "benchmark": benchmark.name,
        "mode": mode,
        "metric": benchmark.metric,
        "strides": {item.name: _stride_json(item) for item in scores},
    }


def _stride_json(item: StrideScore) -> dict[str, Any]:
    score = item.score
    values: dict[str, Any] = {
        "rows": item.num_rows,
        "errors": item.errors,
        "missing": item.missing,
        **item.shape,
    }
    if score is None:
        return {**values, "metrics": {}, "notes": []}
    cells = [
        {"group": c.group, "length": c.length, "depth": c.depth, "mean": c.mean, "count": c.count}
        for c in score.cells
    ]
    return {
        **values,
        "metrics": {name: _plain(value) for name, value in score.metrics.items()},
        "lengths": list(score.lengths),
        "by_length": {name: [_plain(value) for value in line] for name, line in score.by_length.items()},
        "cells": cells,
        "notes": list(score.notes),
    }


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(benchmark: Benchmark, mode: Mode, scores: Sequence[StrideScore]) -> str:
    """Metrics by stride as text, with the reading, the counts and what a reader must know."""
    names = list(dict.fromkeys(name for item in scores if item.score for name in item.score.metrics))
    head = [
        f"mode {mode}",
        *(item.name if item.name == "recorded" else f"stride {item.name}" for item in scores),
    ]
    lines = [head]
    for name in names:
        values = [item.score.metrics.get(name) if item.score else None for item in scores]
        lines.append([name, *(_percent(value) for value in values)])
    lines.append(["answers", *(str(item.num_rows) for item in scores)])
    if any(not item.is_complete for item in scores):
        lines.append(["errors", *(str(len(item.errors)) for item in scores)])
        lines.append(["missing", *(str(item.missing) for item in scores)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [f"{benchmark.title}: {benchmark.metric}"]
    for line in lines:
        text.append("  ".join(_aligned(line, widths)))
    for item in scores:
        text += _length_lines(item)
    notes = dict.fromkeys(note for item in scores if item.score for note in item.score.notes)
    text += [f"note: {note}" for note in notes]
    return "\n".join(text)


def _length_lines(item: StrideScore) -> list[str]:
    """Scores of each task at each length."""
    if item.score is None or not item.score.by_length:
        return []
    head = [f"{item.name}, by length", *map(str, item.score.lengths)]
    lines = [head, *([name, *map(_percent, line)] for name, line in item.score.by_length.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["", *("  ".join(_aligned(line, widths)) for line in lines)]


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = line
    return [
        first.ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.4f}"


def cells_csv(scores: Sequence[StrideScore]) -> str:
    """All cells as comma separated values, with 95 % Wilson intervals of their means."""
    lines = ["stride,group,length,depth,count,mean,low,high"]
    for item in scores:
        for cell in item.score.cells if item.score else ():
            low, high = wilson(cell.total, cell.count)
            where = [
                cell.group,
                "" if cell.length is None else cell.length,
                "" if cell.depth is None else cell.depth,
            ]
            lines.append(
                ",".join([item.name, *map(str, where), str(cell.count)])
                + f",{cell.mean:.6f},{low:.4f},{high:.4f}"
            )
    return "\n".join(lines) + "\n"


def write_report(folder: Path, benchmark: Benchmark, mode: Mode, scores: Sequence[StrideScore]) -> str:
    """Write scores.json, table.txt and cells.csv; returns the table.

    Raises:
        ConfigError: the folder cannot be written.
    """
    text = table(benchmark, mode, scores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / SCORES, json.dumps(as_json(benchmark, mode, scores), indent=1) + "\n")
        write_atomic(folder / "table.txt", text + "\n")
        write_atomic(folder / "cells.csv", cells_csv(scores))
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); give --out with a folder that can"
        ) from None
    return text


def problems(scores: Sequence[StrideScore]) -> list[str]:
    """One line for each stride that is not complete, with the first error."""
    lines = []
    for item in scores:
        if item.errors:
            first = next(iter(item.errors.items()))
            lines.append(
                f"{item.name}: {len(item.errors)} questions ended with an error and are in no number above; the "
                f"first is {first[0]}: {first[1]}"
            )
        if item.missing:
            lines.append(f"{item.name}: {item.missing} questions have no answer yet; run `evaluate` again")
    return lines


def read_scores(folder: Path) -> Mapping[str, Any]:
    """`scores.json` of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        return json.loads((folder / SCORES).read_bytes())
    except OSError:
        raise ConfigError(
            f"{folder}: has no {SCORES}; run  megatron-v2pe score NAME {folder}  first"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{folder / SCORES}: damaged ({error}); score the folder again") from None
