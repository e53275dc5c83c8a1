"""Versions of a data set's index in its folder, brought up to date with the annotation file.

same size and time            nothing is read
same content (hash)           the file was touched; a second of hashing
begins with what is known     the file grew; only new lines are measured
anything else                 measured again
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.build import build_rows, measure_into, measuring_progress, read_bounded
from megatron_v2pe.data.index.parts import PartFolder
from megatron_v2pe.data.index.rows import (
    IndexRows,
    RowCollector,
    concatenate,
    no_rows,
    open_rows,
    sorted_rows,
    write_rows,
)
from megatron_v2pe.data.index.scan import FileScan, byte_range, check_kind, scan_file
from megatron_v2pe.data.samples.measure import LineMeasurer
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import file_facts, open_binary

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file; file systems without locks let several ranks do the same work at once."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: no file locks here (%s); each rank does the same work", path, error)
        yield


class IndexCache:
    """Versions of one index; the caller holds the lock.

    rows-CONTENT-BAD/    arrays of a whole file with that many bad lines; the newest wins
    stat.json            which version is in force, and size and time of the file when it was last read
    parts-CONTENT/       an unfinished pass
    """

    def __init__(self, folder: Path, entry: DatasetEntry, settings: SampleSettings) -> None:
        self._folder = folder
        self._entry = entry
        self._settings = settings

    def rows(self, *, workers: int, show_progress: bool) -> tuple[IndexRows, str]:
        """The rows of the file as it is now, and its content's digest."""
        stat = self._stat()
        known = self._known()
        if known is not None and known[1]["stat"] == stat:
            return self._retried(*known, stat)
        check_kind(self._entry.annotation)
        scan = scan_file(self._entry.annotation, prefix=known[1]["size"] if known else 0)
        if known is not None and scan.digest == known[1]["content"]:
            rows, content = self._retried(*known, stat)
            return self._stored(rows, {**known[1], "stat": stat}), content
        kept, blocks = no_rows(), list(scan.blocks)
        if known is not None and scan.prefix_digest == known[1]["content"]:
            covered, lines = known[1]["covered"], known[1]["covered_lines"]
            kept = known[0].before(covered)
            blocks = [
                byte_range(max(block.start, covered), block.end, max(block.first_line, lines + 1), next_line)
                for block in scan.blocks
                if block.end > covered
                for next_line in [block.first_line + block.num_lines]
            ]
            logger.info("%s: grew; %d lines are known", self._entry.annotation, lines)
        parts = PartFolder(self._folder / f"parts-{scan.digest[:16]}")
        total = sum(block.num_lines for block in blocks)
        with measuring_progress(self._entry, total, show_progress) as progress:
            new = build_rows(
                self._entry, self._settings, blocks, parts=parts, workers=workers, progress=progress
            )
        facts = {
            "stat": stat,
            "content": scan.digest,
            "size": scan.size,
            "covered": scan.covered,
            "covered_lines": scan.covered_lines,
        }
        rows = self._stored(concatenate([kept, new]), facts)
        parts.remove()
        self._clean(scan)
        return rows, scan.digest

    def _stat(self) -> list[Any]:
        try:
            return list(file_facts(self._entry.annotation))
        except OSError as error:
            raise DataError(f"{self._entry.annotation}: {error.strerror}") from None

    def _known(self) -> tuple[IndexRows, dict[str, Any]] | None:
        """The version in force; None when there is none or it is damaged."""
        versions = sorted(self._folder.glob("rows-*"), key=lambda path: path.stat().st_mtime)
        for folder in reversed(versions):
            try:
                rows, facts = open_rows(folder)
                if set(facts) >= {"stat", "content", "size", "covered", "covered_lines"}:
                    return rows, facts
                raise KeyError("facts are missing")
            except (OSError, ValueError, KeyError, EOFError) as error:
                logger.warning("%s: damaged index (%s); the data is measured again", folder, error)
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _stored(self, rows: IndexRows, facts: Mapping[str, Any]) -> IndexRows:
        """Write a version, and map it."""
        identity = hashlib.sha256(json.dumps([facts, len(rows), len(rows.bad)]).encode()).hexdigest()[:12]
        folder = self._folder / f"rows-{identity}"
        write_rows(folder, rows, facts)
        for other in self._folder.glob("rows-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return open_rows(folder)[0]

    def _retried(self, rows: IndexRows, facts: dict[str, Any], stat: list[Any]) -> tuple[IndexRows, str]:
        """Rows with the lines that were bad and are good now."""
        if not any(bad.kind == "broken" for bad in rows.bad):
            return rows, facts["content"]
        measurer = LineMeasurer(self._entry, self._settings)
        collected = RowCollector()
        with open_binary(self._entry.annotation) as file:
            for bad in rows.bad:
                file.seek(bad.offset)
                line, length = read_bounded(file)
                if length > len(line):
                    collected.bad.append(bad)
                    continue
                measure_into(
                    collected,
                    line,
                    bad.offset,
                    bad.line_number,
                    measurer=measurer,
                    entry=self._entry,
                )
        if len(collected.bad) == len(rows.bad):
            return rows, facts["content"]
        still_bad = {bad.offset for bad in collected.bad}
        logger.info(
            "%s: %d bad lines are good now", self._entry.annotation, len(rows.bad) - len(collected.bad)
        )
        good = replace(collected.rows(), bad=())
        kept = rows.without_bad({bad.offset for bad in rows.bad} - still_bad)
        return self._stored(sorted_rows(concatenate([kept, good])), {**facts, "stat": stat}), facts["content"]

    def _clean(self, scan: FileScan) -> None:
        """Parts of passes over other contents are of no use any more."""
        for folder in self._folder.glob("parts-*"):
            if folder.name != f"parts-{scan.digest[:16]}":
                shutil.rmtree(folder, ignore_errors=True)
