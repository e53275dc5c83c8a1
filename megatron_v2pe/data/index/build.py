"""One pass over an annotation file: byte ranges measured by processes, results written aside every few seconds.

    blocks of 1 MiB --pool--> rows, at most 2 s of work each --every 2 s--> parts/*.npz

A part that is written is never measured again: after a kill the pass goes on with what no part covers, so less than
five seconds are lost. Parts are kept under the hash of the file's content; of a file that changed they are not found.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.logging import get_logger
from megatron_v2pe.core.processes import end_with_parent, worker_context
from megatron_v2pe.data.index.rows import (
    BadSample,
    IndexRows,
    RowCollector,
    concatenate,
    read_part,
    write_part,
)
from megatron_v2pe.data.index.scan import ByteRange, byte_range
from megatron_v2pe.data.samples.measure import LineMeasurer, LongSampleError
from megatron_v2pe.data.samples.sample_maker import SampleSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import open_binary

_log = get_logger(__name__)
_SLICE_S = 2.0  # a worker's longest turn, and the time between parts
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
            while offset < lines.end and (offset == lines.start or time.monotonic() - started < _SLICE_S):
                line = file.readline()
                if not line:
                    raise DataError(f"{entry.annotation}: became shorter while it was measured; try again")
                if line.strip():
                    measure_into(rows, line, offset, number, measurer=measurer, entry=entry)
                offset, number = offset + len(line), number + 1
    except OSError as error:
        raise DataError(f"{entry.annotation}: {error.strerror}") from None
    done = ByteRange(
        start=lines.start, end=offset, first_line=lines.first_line, num_lines=number - lines.first_line
    )
    return rows.rows(), done


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
                message=message if message.startswith(where) else f"{where}: {message}",
                kind="long" if isinstance(error, LongSampleError) else "broken",
                offset=offset,
            )
        )


class PartFolder:
    """Rows of a pass that is under way, safe from a kill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: list[tuple[IndexRows, ByteRange]] = []
        self._done: list[tuple[IndexRows, ByteRange]] = self._read()
        self._last = time.monotonic()

    @property
    def finished(self) -> list[tuple[IndexRows, ByteRange]]:
        """What is on the disk."""
        return list(self._done)

    def add(self, rows: IndexRows, done: ByteRange) -> None:
        """Take rows; they are on the disk two seconds later, or at `flush`."""
        self._waiting.append((rows, done))
        if time.monotonic() - self._last >= _SLICE_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            ranges = [[done.start, done.end, done.first_line, done.num_lines] for _, done in self._waiting]
            counts = [[len(rows), len(rows.bad)] for rows, _ in self._waiting]
            rows = concatenate([rows for rows, _ in self._waiting])
            self._folder.mkdir(exist_ok=True)
            name = f"part-{ranges[0][0]:016d}-{len(ranges)}.npz"
            write_part(self._folder / name, rows, {"ranges": ranges, "counts": counts})
            self._done += self._waiting
            self._waiting = []
        self._last = time.monotonic()

    def rows(self) -> IndexRows:
        """Everything, in the order of the file."""
        self.flush()
        return concatenate([rows for rows, _ in sorted(self._done, key=lambda each: each[1].start)])

    def remove(self) -> None:
        """Delete the parts, which are not needed once the whole is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> list[tuple[IndexRows, ByteRange]]:
        found: list[tuple[IndexRows, ByteRange]] = []
        for path in sorted(self._folder.glob("part-*.npz")):
            try:
                rows, facts = read_part(path)
                found += list(_pieces(rows, facts["ranges"], facts["counts"]))
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                _log.warning("%s: damaged (%s); its lines are measured again", path, error)
                path.unlink(missing_ok=True)
        return found


def _pieces(
    rows: IndexRows, ranges: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]
) -> Iterator[tuple[IndexRows, ByteRange]]:
    """Rows of a part, range by range."""
    row = image = bad = 0
    for (start, end, first_line, num_lines), (num_rows, num_bad) in zip(ranges, counts, strict=True):
        images = int(rows.arrays["num_images"][row : row + num_rows].sum())
        arrays = {
            name: values[image : image + images] if name == "sizes" else values[row : row + num_rows]
            for name, values in rows.arrays.items()
        }
        yield (
            IndexRows(arrays=arrays, bad=rows.bad[bad : bad + num_bad]),
            ByteRange(start=start, end=end, first_line=first_line, num_lines=num_lines),
        )
        row, image, bad = row + num_rows, image + images, bad + num_bad


def remaining(blocks: Sequence[ByteRange], done: Sequence[ByteRange]) -> list[ByteRange]:
    """What of the blocks no finished range covers."""
    left: list[ByteRange] = []
    for block in blocks:
        position, line = block.start, block.first_line
        inside = [each for each in done if block.start <= each.start < block.end]
        for each in sorted(inside, key=lambda each: each.start):
            if position < each.start:
                left.append(byte_range(position, each.start, line, each.first_line))
            position, line = each.end, each.first_line + each.num_lines
        if position < block.end:
            left.append(byte_range(position, block.end, line, block.first_line + block.num_lines))
    return left


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
        parts: finished ones are taken from here, new ones go here.
        workers: processes; below 2 this one does it.
        progress: called with numbers of lines and of bad lines that were done.
    """
    for rows, done in parts.finished:
        progress(done.num_lines, len(rows.bad))
    todo = remaining(blocks, [done for _, done in parts.finished])
    try:
        if (
            workers < 2 or len(todo) < 2
        ):  # one block is one worker's; starting it would take longer than most blocks
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
                try:
                    rows, done = future.result()
                except BrokenProcessPool:
                    raise DataError(
                        f"{entry.annotation}: a process that measured was killed (out of memory?); what is done is "
                        "kept, start again with fewer workers"
                    ) from None
                parts.add(rows, done)
                progress(done.num_lines, len(rows.bad))
                queue += _rest(lines, done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
