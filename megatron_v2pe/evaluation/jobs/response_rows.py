"""Rows on the disk: one json line an answer, appended when it exists; whatever stops a run, they survive.

    OUT/benchmark.json                  what is evaluated (`run_identity.py`)
    OUT/rows_<stride>.<replica>.jsonl   answers; each replica of the model writes a file of its own
    OUT/media.<replica>.jsonl           SHA-256 of every image and video that was read

A last line without its end was cut by whoever killed the writer: it is dropped and its question asked again. Rows that
belong to another question, image or stride are refused by name, and so is an id with two answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import append_json, read_jsonl
from megatron_v2pe.evaluation.benchmarks.base import Request, Response, Row
from megatron_v2pe.evaluation.jobs.identity import question_digest
from megatron_v2pe.evaluation.jobs.media_digests import MediaDigests


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """An answer as it lies in a file.

    Attributes:
        response: the answer.
        gold: what it is measured against.
        stride: that it was given with.
        question: digest of the question and its settings.
        media: digest of the images and videos it showed; empty where they could not be read.
        where: file and line.
    """

    response: Response
    gold: Mapping[str, Any]
    stride: str
    question: str
    media: str
    where: str

    @property
    def row(self) -> Row:
        """For scoring."""
        return Row(response=self.response, gold=self.gold)


def row_files(folder: Path, stride: str) -> list[Path]:
    """All files of answers of a stride."""
    return sorted(folder.glob(f"rows_{stride}.*.jsonl"))


def rows_path(folder: Path, stride: str, replica: int) -> Path:
    """File of answers of one replica."""
    return folder / f"rows_{stride}.{replica}.jsonl"


def append_row(
    path: Path, request: Request, response: Response, *, stride: str, question: str, media: str
) -> None:
    """Write one answer, in a single call."""
    line = {key: value for key, value in asdict(response).items() if value is not None}
    append_json(
        path, {**line, "stride": stride, "gold": dict(request.gold), "question": question, "media": media}
    )


def drop_cut_lines(folder: Path) -> int:
    """Take the last line off each file that lacks its end; call it before anybody writes.

    Returns:
        How many there were.
    """
    count = 0
    for path in [*folder.glob("rows_*.jsonl"), *folder.glob("media.*.jsonl")]:
        content = path.read_bytes()
        kept = content.rfind(b"\n") + 1
        if kept < len(content):
            os.truncate(path, kept)
            count += 1
    return count


def read_rows(folder: Path, stride: str) -> dict[str, StoredRow]:
    """Answers of a stride by id; where an error was tried again, what came after.

    Raises:
        DataError: a line is no answer, belongs to another stride, or gives a second answer to an id.
    """
    found: dict[str, StoredRow] = {}
    for path in row_files(folder, stride):
        for number, values in read_jsonl(path, skip_cut=True):
            row = _parsed(values, f"{path}:{number}")
            if row.stride != stride:
                raise DataError(
                    f"{row.where}: was answered with stride {row.stride}, not {stride}; choose another --out or remove "
                    "it"
                )
            before = found.get(row.response.id)
            if before is None or before.response.error is not None:
                found[row.response.id] = row
            elif row.response.error is None:
                raise DataError(
                    f"{row.where}: id {row.response.id!r} was answered at {before.where} already; remove one of them"
                )
    return found


def _parsed(values: Mapping[str, Any], where: str) -> StoredRow:
    fields = dict(values)
    try:
        stored = {key: fields.pop(key) for key in ("stride", "gold", "question", "media")}
        logprobs = fields.pop("token_logprobs", None)
        response = Response(**fields, token_logprobs=None if logprobs is None else tuple(logprobs))
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not a row of answers ({error}); remove the line") from None
    return StoredRow(response=response, where=where, **stored)


def check_rows(rows: Mapping[str, StoredRow], requests: Sequence[Request], *, digests: MediaDigests) -> None:
    """Refuse answers to questions that are asked differently now.

    Args:
        rows: answers of an earlier start.
        requests: what is asked now.
        digests: of the media files.

    Raises:
        DataError: names the id, and whether its question or its images changed.
    """
    asked = {request.id: request for request in requests}
    for name, row in rows.items():
        request = asked.get(name)
        if request is None:
            raise DataError(
                f"{row.where}: answers {name!r}, which is not asked; choose another --out or remove it"
            )
        if question_digest(request) != row.question:
            raise DataError(
                f"{row.where}: the question {name!r} is not the one that was answered (text, options, answer or "
                "settings changed); choose another --out, or remove its rows"
            )
        if row.media and digests.of(request) != row.media:
            raise DataError(
                f"{row.where}: an image or video of {name!r} is not the one that was shown; choose another --out, or "
                "remove its rows"
            )


def pending(
    requests: Iterable[Request], rows: Mapping[str, StoredRow], *, retry_errors: bool
) -> list[Request]:
    """Requests without an answer; those with an error count as answered unless they are to be tried again."""
    return [
        request
        for request in requests
        if request.id not in rows or (retry_errors and rows[request.id].response.error is not None)
    ]
