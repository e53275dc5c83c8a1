"""MMMU, validation split (Yue et al., 2024): 30 subjects, several images, options or an open answer.

    DATA/Accounting/validation-00000-of-00001.parquet ...     (MMMU/MMMU of Hugging Face; images are in the files)

Release: `V2PE:eval/mmmu`, as it asks with V2PE positions: `The <image 1> is <image>, ...` before the question, one span
an image. The first image is enlarged twice before it is tiled, further ones are one tile each. (With default positions
the release puts all tiles into one span; here the prompt does not depend on the stride, so that strides compare.)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Part,
    Request,
    Row,
    Score,
    group_cells,
    interleave,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import need, parquet_records
from megatron_v2pe.evaluation.benchmarks.sets.choices import LETTER_PROMPT, letter_value, lettered
from megatron_v2pe.evaluation.metrics.letters import letter_of
from megatron_v2pe.evaluation.metrics.open_answers import mmmu_open_is_correct

DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECTS = {subject: domain for domain, names in DOMAINS.items() for subject in names.split()}
_PHRASE = "Answer the question using a single word or phrase."


class MMMU(Benchmark):
    """900 questions of 30 subjects."""

    name = "mmmu-val"
    title = "MMMU (val)"
    metric = "accuracy (Yue et al. 2024)"
    download = (
        "MMMU/MMMU of Hugging Face: every subject's folder with validation-00000-of-00001.parquet into DATA/"
    )

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a subject."""
        return [
            DataFile(
                set=subject,
                path=data_dir / subject / "validation-00000-of-00001.parquet",
                root=data_dir,
                published=30,
            )
            for subject in sorted(SUBJECTS)
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        for where, record in parquet_records(file.path):
            yield _request(record, file.set, where)

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Share of right answers; subjects have as many questions each."""
        values = [_value(row, mode) for row in rows]
        domains: dict[str, list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            domains.setdefault(SUBJECTS.get(row.gold["set"], "other"), []).append(value)
        return Score(
            mode=mode,
            metrics={"accuracy": mean(values)} | {name: mean(found) for name, found in domains.items()},
            cells=group_cells([(row.gold["set"], v) for row, v in zip(rows, values, strict=True)]),
            rows=row_scores(rows, values),
        )


def _request(record: Mapping[str, Any], subject: str, where: str) -> Request:
    question = need(record, "question", str, where).strip()
    try:
        choices = ast.literal_eval(need(record, "options", str, where))
    except (ValueError, SyntaxError):
        raise DataError(f"{where}: options is no list of texts: {record['options']!r}") from None
    options = {letter_of(index): str(choice) for index, choice in enumerate(choices)}
    is_open = need(record, "question_type", str, where) == "open"
    lines = f"\n{lettered(options)}" if options else ""
    text = f"{question}{lines}\n{_PHRASE if is_open else LETTER_PROMPT}".strip()
    images = [image["bytes"] for n in range(1, 8) if (image := record.get(f"image_{n}")) is not None]
    if not images:
        raise DataError(f"{where}: image_1 is missing; every question has an image")
    # `<image 1>` is text to the release, only the bare mark is a place for an image.
    named = ", ".join(f"The <image {n}> is <image>" for n in range(1, len(images) + 1))
    parts = interleave(f"{named}\n", [""] * len(images))
    found = iter(enumerate(images))
    placed = [_with_image(part, found) if part.kind == "image" else part for part in parts]
    answer = need(record, "answer", str, where)
    return Request(
        id=need(record, "id", str, where),
        parts=(*placed, Part(kind="text", text=text)),
        max_new_tokens=10,
        max_tiles=6,
        gold={
            "set": subject,
            "answer": _answers(answer) if is_open else answer,
            "options": options,
            "is_open": is_open,
        },
    )


def _with_image(part: Part, images: Iterator[tuple[int, bytes]]) -> Part:
    number, data = next(images)
    return Part(
        kind="image", data=data, enlarge=2 if number == 0 else 1, max_tiles=None if number == 0 else 1
    )


def _answers(text: str) -> list[str]:
    """One open answer, or a list of them written as Python writes it."""
    if re.match(r"^\[.*\]$", text):
        try:
            return [str(item) for item in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            pass
    return [text]


def _value(row: Row, mode: Mode) -> float:
    if not row.gold["is_open"]:
        return letter_value(row.text, row.gold["answer"], row.gold["options"], mode)
    if mode == "clean" and not row.text.strip():
        return 0.0
    return float(mmmu_open_is_correct(row.text, row.gold["answer"]))
