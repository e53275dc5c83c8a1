"""Rows of a pass that is under way, kept on the disk as parts; a part that is written is never measured again.

The folder is named by the hash of the annotation file's content, so parts of a file that changed are not found.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

from megatron_v2pe.data.index.rows import IndexRows, concatenate, read_part, write_part
from megatron_v2pe.data.index.scan import ByteRange, byte_range

logger = logging.getLogger(__name__)
_WRITE_EVERY_S = 2.0


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
        """Add rows; they are on the disk two seconds later, or at `flush`."""
        self._waiting.append((rows, done))
        if time.monotonic() - self._last >= _WRITE_EVERY_S:
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
                found += list(_ranges_of(rows, facts["ranges"], facts["counts"]))
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                logger.warning("%s: damaged (%s); its lines are measured again", path, error)
                path.unlink(missing_ok=True)
        return found


def _ranges_of(
    rows: IndexRows, ranges: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]
) -> Iterator[tuple[IndexRows, ByteRange]]:
    """Rows of a part, range by range."""
    starts: dict[str, int] = {}
    bad = 0
    for (start, end, first_line, num_lines), (num_rows, num_bad) in zip(ranges, counts, strict=True):
        yield (
            replace(rows.slice(starts, num_rows), bad=rows.bad[bad : bad + num_bad]),
            ByteRange(start=start, end=end, first_line=first_line, num_lines=num_lines),
        )
        bad += num_bad


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
