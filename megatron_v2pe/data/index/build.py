"""One pass over an annotation file: byte ranges measured by processes, results written aside every few seconds.

    blocks of 1 MiB --pool--> rows, at most 2 s of work each --every 2 s--> parts/*.npz

After a kill the pass continues with what no part covers, so less than five seconds are lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO

from tqdm import tqdm

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.processes import end_with_parent, worker_context
from megatron_v2pe.data.index.parts import PartFolder, remaining
from megatron_v2pe.data.index.rows import BadSample, IndexRows, RowCollector
from megatron_v2pe.data.index.scan import ByteRange
from megatron_v2pe.data.samples.measure import LineMeasurer, LongSampleError
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import open_binary

logger = logging.getLogger(__name__)
_TURN_S = 2.0  # longest turn of a worker
_LOG_EVERY_S = 10.0
MAX_LINE_BYTES = 24 * 2**20  # of a record; a text of a million tokens has about a fifth of it
_SKIPPED_BYTES = 2**20
_MOST_MESSAGE = 800  # characters
Progress = Callable[[int, int], None]


def measure_range(
    entry: DatasetEntry, settings: SampleSettings, lines: ByteRange, *, measurer: LineMeasurer | None = None
) -> tuple[IndexRows, ByteRange]:
    """Measure lines for at most two seconds.

    Returns:
        the rows, and the range that they cover: a beginning of `lines`, or all of it.

    Raises:
        DataError: the file cannot be read.
    """
    measurer = measurer or LineMeasurer(entry, settings)
    rows = RowCollector()
    started, offset, number = time.monotonic(), lines.start, lines.first_line
    try:
        with open_binary(entry.annotation) as file:
            file.seek(offset)
            while offset < lines.end and (offset == lines.start or time.monotonic() - started < _TURN_S):
                line, length = read_bounded(file)
                if not length:
                    raise DataError(f"{entry.annotation}: became shorter while it was measured; try again")
                if length > len(line):
                    rows.bad.append(_too_long(entry, number, offset, length))
                elif line.strip():
                    measure_into(rows, line, offset, number, measurer=measurer, entry=entry)
                offset, number = offset + length, number + 1
    except OSError as error:
        raise DataError(f"{entry.annotation}: {error.strerror}") from None
    done = ByteRange(
        start=lines.start, end=offset, first_line=lines.first_line, num_lines=number - lines.first_line
    )
    return rows.rows(), done


def read_bounded(file: BinaryIO) -> tuple[bytes, int]:
    """The next line and its length; of a longer one than `MAX_LINE_BYTES` only the beginning, the rest is skipped."""
    line = file.readline(MAX_LINE_BYTES)
    length = len(line)
    while length >= MAX_LINE_BYTES and not line.endswith(b"\n"):
        more = file.readline(_SKIPPED_BYTES)
        if not more:
            break
        length += len(more)
        if more.endswith(b"\n"):
            break
    return line, length


def _too_long(entry: DatasetEntry, number: int, offset: int, length: int) -> BadSample:
    return BadSample(
        sample_id=f"{entry.name}:{number}",
        line_number=number,
        message=(
            f"{entry.annotation}:{number}: the line has {length:,} bytes, more than {MAX_LINE_BYTES:,}; a record is "
            "a line: write images to files, and split long documents"
        ),
        offset=offset,
    )


def measure_into(
    rows: RowCollector, line: bytes, offset: int, number: int, *, measurer: LineMeasurer, entry: DatasetEntry
) -> None:
    """Measure one line; what is wrong with it goes to the list of bad ones, with file and line."""
    try:
        rows.add(offset, number, measurer(line, number))
    except DataError as error:
        where, message = f"{entry.annotation}:{number}", str(error)
        rows.bad.append(
            BadSample(
                sample_id=f"{entry.name}:{number}",
                line_number=number,
                message=_of_a_line(message if message.startswith(where) else f"{where}: {message}"),
                kind="long" if isinstance(error, LongSampleError) else "broken",
                offset=offset,
            )
        )


def _of_a_line(message: str) -> str:
    """A message that a terminal shows on a few lines, whatever a record made of it."""
    return message if len(message) <= _MOST_MESSAGE else f"{message[:_MOST_MESSAGE]}..."


def build_rows(
    entry: DatasetEntry,
    settings: SampleSettings,
    blocks: Sequence[ByteRange],
    *,
    parts: PartFolder,
    workers: int,
    progress: Progress,
) -> IndexRows:
    """Measure blocks, in this process or in several, and keep parts on the way.

    Args:
        entry: the data set.
        settings: of the run.
        blocks: what is to be covered.
        parts: holds finished ones, new ones go here.
        workers: processes; below 2 this one does it.
        progress: called with numbers of lines and of bad lines that were done.
    """
    for rows, done in parts.finished:
        progress(done.num_lines, len(rows.bad))
    todo = remaining(blocks, [done for _, done in parts.finished])
    try:
        if (
            workers < 2 or len(todo) < 2
        ):  # one block is one worker's; starting it would last longer than most blocks
            _measure_here(entry, settings, todo, parts=parts, progress=progress)
        else:
            _measure_in_pool(entry, settings, todo, parts=parts, workers=workers, progress=progress)
    finally:
        parts.flush()  # also when it is interrupted
    return parts.rows()


def _rest(lines: ByteRange, done: ByteRange) -> list[ByteRange]:
    if done.end >= lines.end:
        return []
    return [
        replace(
            lines,
            start=done.end,
            first_line=done.first_line + done.num_lines,
            num_lines=lines.num_lines - done.num_lines,
        )
    ]


def _measure_here(
    entry: DatasetEntry,
    settings: SampleSettings,
    todo: list[ByteRange],
    *,
    parts: PartFolder,
    progress: Progress,
) -> None:
    measurer = LineMeasurer(entry, settings)
    queue = todo[::-1]
    while queue:
        lines = queue.pop()
        rows, done = measure_range(entry, settings, lines, measurer=measurer)
        parts.add(rows, done)
        progress(done.num_lines, len(rows.bad))
        queue += _rest(lines, done)


_worker: tuple[DatasetEntry, SampleSettings, LineMeasurer] | None = None


def _start_worker(entry: DatasetEntry, settings: SampleSettings) -> None:
    global _worker
    end_with_parent()
    _worker = (entry, settings, LineMeasurer(entry, settings))


def _measure_in_worker(lines: ByteRange) -> tuple[IndexRows, ByteRange]:
    assert _worker is not None, "the pool's initializer did not run"
    entry, settings, measurer = _worker
    return measure_range(entry, settings, lines, measurer=measurer)


def _measure_in_pool(
    entry: DatasetEntry,
    settings: SampleSettings,
    todo: list[ByteRange],
    *,
    parts: PartFolder,
    workers: int,
    progress: Progress,
) -> None:
    """Keep every worker busy with two blocks; the rest of an unfinished block goes first."""
    queue = todo[::-1]
    context = worker_context(__name__)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(entry, settings))
    running: dict[Future[tuple[IndexRows, ByteRange]], ByteRange] = {}
    try:
        while queue or running:
            while queue and len(running) < 2 * workers:
                lines = queue.pop()
                running[pool.submit(_measure_in_worker, lines)] = lines
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                lines = running.pop(future)
                rows, done = future.result()
                parts.add(rows, done)
                progress(done.num_lines, len(rows.bad))
                queue += _rest(lines, done)
    except BrokenProcessPool:  # raised by a result, and by submitting to a pool that has lost a process
        raise DataError(
            f"{entry.annotation}: a process that measured was killed (out of memory?); what is done is "
            "kept, start again with fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def measuring_progress(entry: DatasetEntry, total: int, show: bool) -> Iterator[Progress]:
    """A bar with records per second and time left on a terminal; a log line every ten seconds elsewhere."""
    started = last = time.monotonic()
    num_done = num_bad = 0
    bar = tqdm(total=total, unit="rec", desc=entry.name[:40], disable=None if show else True)

    def update(lines: int, bad: int) -> None:
        nonlocal last, num_done, num_bad
        num_done, num_bad = num_done + lines, num_bad + bad
        bar.update(lines)
        bar.set_postfix(bad=num_bad, refresh=False)
        now = time.monotonic()
        if bar.disable and now - last > _LOG_EVERY_S:
            last, rate = now, num_done / (now - started)
            left = (total - num_done) / max(rate, 1e-9)
            logger.info(
                "%s: %d of %d lines, %d bad, %.0f/s, %.0f s left",
                entry.annotation,
                num_done,
                total,
                num_bad,
                rate,
                left,
            )

    try:
        yield update
    finally:
        bar.close()
    seconds = time.monotonic() - started
    logger.info("%s: measured %d lines in %.1f s, %d bad", entry.annotation, num_done, seconds, num_bad)
