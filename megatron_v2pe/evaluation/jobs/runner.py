"""A benchmark from its questions to its rows, on any number of processes; every stride in turn.

requests --missing answers, longest first, over replicas--> answerer --> rows_<stride>.<replica>.jsonl
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image
from tqdm import tqdm

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.evaluation.benchmarks.base import Part, Request, Response
from megatron_v2pe.evaluation.jobs.eta import TimeLeft, estimated_tokens
from megatron_v2pe.evaluation.jobs.identity import question_digest
from megatron_v2pe.evaluation.jobs.media_digests import MediaDigests
from megatron_v2pe.evaluation.jobs.response_rows import (
    append_row,
    check_rows,
    drop_cut_lines,
    pending,
    read_rows,
    row_files,
    rows_path,
)
from megatron_v2pe.evaluation.retrieval.questions import Share, StrideSetting

_log = logging.getLogger(__name__)
_REPORT_EVERY_S = 60.0
_POLL_S = 2.0
IMAGES = "images"


class BrokenReplicaError(RuntimeError):
    """One rank of a replica ran out of memory in the middle of a forward; the others wait for it in vain.

    Attributes:
        response: the row to leave, so that the next start goes past the question.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(f"{response.id}: {response.error}")
        self.response = response


class BenchmarkAnswerer(Protocol):
    """Whatever can answer requests: a model, or a stand-in in tests; see `engine_adapter.ModelAnswerer`."""

    def prepare(self, setting: StrideSetting) -> Share:
        """Get ready for a stride; returns this process's share. Collective."""

    def answer(self, request: Request, setting: StrideSetting) -> Response:
        """One answer, or its error."""

    def close(self) -> None:
        """Wait until every process has answered, and release the model. Collective."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is answered, and where to.

    Attributes:
        requests: all questions.
        settings: strides.
        folder: of rows.
        retry_errors: ask again what ended with an error.
        is_first: one process of all prepares the folder.
        waits: with several replicas, wait for the others' rows before the next collective.
    """

    requests: Sequence[Request]
    settings: Sequence[StrideSetting]
    folder: Path
    retry_errors: bool = False
    is_first: bool = True
    waits: bool = True


def limited(requests: Iterable[Request], limit: int) -> Iterator[Request]:
    """The first `limit` requests of each set; 0 is all."""
    counts: dict[str, int] = {}
    for request in requests:
        name = str(request.gold.get("set", ""))
        counts[name] = counts.get(name, 0) + 1
        if not limit or counts[name] <= limit:
            yield request


def with_files(request: Request, folder: Path, *, is_writer: bool) -> Request:
    """The request with a file for each image that lies inside an annotation file, or is shown enlarged.

    Args:
        request: as made by a benchmark.
        folder: for such images, named by their content.
        is_writer: write those that are not there yet.

    Raises:
        DataError: two requests share an id with different content, or an image cannot be enlarged.
    """
    parts = tuple(
        _with_file(part, folder, is_writer, request.id) if part.data or part.enlarge > 1 else part
        for part in request.parts
    )
    return dataclasses.replace(request, parts=parts)


def _with_file(part: Part, folder: Path, is_writer: bool, name: str) -> Part:
    try:
        data = part.data or Path(part.path).read_bytes()
    except OSError:
        return part  # reported when it is opened, as an error of its row
    digest = hashlib.sha256(data + bytes([part.enlarge])).hexdigest()
    path = folder / f"{digest[:32]}{'.png' if part.enlarge > 1 else ''}"
    if is_writer and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(path, data if part.enlarge == 1 else _enlarged(data, part.enlarge))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name}: an image in the annotation file cannot be read ({error})") from None
    return dataclasses.replace(part, path=str(path), data=b"", enlarge=1)


def _enlarged(data: bytes, factor: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        size = image.width * factor, image.height * factor
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(out, format="png")
    return out.getvalue()


def unique_ids(requests: Sequence[Request]) -> None:
    """Raise DataError where two requests share an id, which says what has been answered."""
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise DataError(f"the data has two questions with the id {request.id!r}; ids must be unique")
        seen.add(request.id)


def answer_all(work: Work, answerer: BenchmarkAnswerer) -> None:
    """Answer what has no answer yet, for every stride.

    Under torchrun every process calls this. All of them see the same open questions: nobody writes before `prepare`
    has brought everybody together, and all files are read before.

    Raises:
        DataError: rows of an earlier start do not belong to these questions.
    """
    if work.is_first and (count := drop_cut_lines(work.folder)):
        _log.warning(
            "%d cut last lines of an earlier start were dropped; their questions are asked again", count
        )
    digests = MediaDigests(work.folder)
    todo: dict[str, list[Request]] = {}
    lines: dict[str, int] = {}  # that there will be; counted before anybody writes
    for setting in work.settings:
        rows = read_rows(work.folder, setting.name)
        check_rows(rows, work.requests, digests=digests)
        todo[setting.name] = pending(work.requests, rows, retry_errors=work.retry_errors)
        lines[setting.name] = count_lines(work.folder, setting.name) + len(todo[setting.name])
    with closing(answerer):
        for setting in work.settings:
            if todo[setting.name]:
                share = answerer.prepare(setting)
                mine = sorted(todo[setting.name], key=estimated_tokens, reverse=True)[
                    share.index :: share.count
                ]
                digests.write_to = work.folder / f"media.{share.index}.jsonl" if share.is_writer else None
                _answer_share(mine, setting, answerer, share=share, folder=work.folder, digests=digests)
                if share.count > 1 and work.waits:
                    wait_for_rows(work.folder, setting.name, lines[setting.name])


def count_lines(folder: Path, stride: str) -> int:
    """Whole lines in all files of answers of a stride."""
    return sum(path.read_bytes().count(b"\n") for path in row_files(folder, stride))


def wait_for_rows(folder: Path, stride: str, count: int, *, poll_s: float = _POLL_S) -> None:
    """Wait for the other replicas without a collective, which would give up after half an hour.

    Args:
        folder: of rows.
        stride: whose rows are counted.
        count: lines that there will be.
        poll_s: between two looks.
    """
    while count_lines(folder, stride) < count:
        time.sleep(poll_s)


def _answer_share(
    mine: Sequence[Request],
    setting: StrideSetting,
    answerer: BenchmarkAnswerer,
    *,
    share: Share,
    folder: Path,
    digests: MediaDigests,
) -> None:
    path = rows_path(folder, setting.name, share.index)
    progress = _Progress(mine, setting.name, is_shown=share.is_writer and share.index == 0)
    for request in mine:
        try:
            response = answerer.answer(request, setting)
        except BrokenReplicaError as error:
            _write(path, request, error.response, setting, digests)
            raise
        if share.is_writer:
            _write(path, request, response, setting, digests)
        progress.answered(request, response)
    progress.close()


def _write(
    path: Path, request: Request, response: Response, setting: StrideSetting, digests: MediaDigests
) -> None:
    append_row(
        path,
        request,
        response,
        stride=setting.name,
        question=question_digest(request),
        media="" if response.error else digests.of(request),
    )


class _Progress:
    """A bar on a terminal, lines in a log: answers, errors, time left."""

    def __init__(self, requests: Sequence[Request], name: str, *, is_shown: bool) -> None:
        self._left = TimeLeft([estimated_tokens(request) for request in requests])
        self._bar = tqdm(
            total=len(requests), desc=f"stride {name}", unit="answer", disable=None if is_shown else True
        )
        self._name, self._is_shown = name, is_shown
        self._count, self._errors, self._reported = 0, 0, time.monotonic()

    def answered(self, request: Request, response: Response) -> None:
        self._count += 1
        self._errors += response.error is not None
        if response.error is None:
            self._left.answered(estimated_tokens(request), response.seconds)
        else:
            _log.warning("%s: %s", response.id, response.error)
        left = self._left.seconds()
        text = f"{response.n_prompt} tokens, {self._errors} errors, {_time(left)} left"
        self._bar.set_postfix_str(text)
        self._bar.update()
        if self._is_shown and time.monotonic() - self._reported > _REPORT_EVERY_S:
            self._reported = time.monotonic()
            _log.info("stride %s: %d of %d answers, %s", self._name, self._count, self._bar.total, text)

    def close(self) -> None:
        self._bar.close()
        _log.info("stride %s: %d answers of this process, %d errors", self._name, self._count, self._errors)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "? s"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
