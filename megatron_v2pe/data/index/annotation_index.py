"""Lengths before pixels: each annotation file is measured once, and the result is kept.

    a.jsonl --scan--> hash, blocks --measure (text, image headers)--> rows, bad lines --> cache_dir/NAME-KEY/

The cache folder belongs to a path and to every setting that changes a length. Inside, the file's content is told by
its hash: of a file that grew only new lines are measured, a touched one costs a second of hashing, an edited one is
measured again. Ranks that start together take turns at a lock; the first one measures, the others map the same arrays.
The folder of the data is never written to.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.logging import get_logger
from megatron_v2pe.data.index.build import PartFolder, Progress, build_rows, measure_into
from megatron_v2pe.data.index.rows import (
    BadSample,
    IndexRows,
    RowCollector,
    concatenate,
    no_rows,
    open_rows,
    sorted_rows,
    write_rows,
)
from megatron_v2pe.data.index.scan import FileScan, byte_range, scan_file
from megatron_v2pe.data.samples.measure import LineMeasurer
from megatron_v2pe.data.samples.sample_maker import SampleSettings, Size, dataset_tiling
from megatron_v2pe.data.samples.split import Units
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.storage import file_facts, open_binary
from megatron_v2pe.v2pe.layout import Int64Array

_log = get_logger(__name__)
_FORMAT = 2
_LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetIndex:
    """Measured samples of one annotation file, n of them with I images in all.

    Attributes:
        entry: the data set.
        content: digest of the annotation file's content.
        settings: what else the measurements depend on, by name.
        offsets: int64 [n], byte offset of each line.
        line_numbers: int64 [n], 1-based; parts of a long sample share a line.
        num_tokens: int64 [n], tokens of each sample after the cut.
        num_supervised: int64 [n], supervised tokens.
        num_tiles: int64 [n], tiles of all images.
        first_image: int64 [n+1], where the images of each sample start in `sizes`.
        sizes: int [I, 2], width and height.
        units: int [n, 2], which part of the line each sample is, see `split`.
        num_cut: samples whose text was cut.
        bad: lines that cannot be used.
    """

    entry: DatasetEntry
    content: str
    settings: Mapping[str, Any]
    offsets: Int64Array
    line_numbers: Int64Array
    num_tokens: Int64Array
    num_supervised: Int64Array
    num_tiles: Int64Array
    first_image: Int64Array
    sizes: NDArray
    units: NDArray
    num_cut: int
    bad: tuple[BadSample, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def num_records(self) -> int:
        """Samples of the file, good and bad."""
        return len(self.offsets) + len(self.bad)

    def image_sizes(self, row: int) -> list[Size]:
        """(width, height) of each image of a sample."""
        rows = self.sizes[self.first_image[row] : self.first_image[row + 1]]
        return [(int(width), int(height)) for width, height in rows]

    def sample_units(self, row: int) -> Units:
        """Which part of its line a sample is."""
        first, last = self.units[row].tolist()
        return first, last

    def sample_id(self, row: int) -> str:
        """Identity of a sample."""
        first, last = self.sample_units(row)
        part = f"[{first}:{last}]" if last else ""
        return f"{self.entry.name}:{self.line_numbers[row]}{part}"


def index_dataset(
    entry: DatasetEntry,
    *,
    settings: SampleSettings,
    cache_dir: str | Path,
    workers: int = 1,
    show_progress: bool = False,
) -> DatasetIndex:
    """Measurements of one data set, from the cache as far as they are there.

    Bad lines of a cached index are tried again, so that a repaired image counts at the next start.

    Args:
        entry: see `meta.read_meta`.
        settings: see `samples.sample_settings`.
        cache_dir: folder of our own; created when missing.
        workers: processes that measure; below 2 this one does.
        show_progress: draw a progress bar on a terminal, write a log line now and then elsewhere.

    Raises:
        DataError: the annotation file or the cache folder cannot be used.
    """
    facts = describe_settings(entry, settings)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", entry.name)[:80]
    folder = Path(cache_dir) / f"{name}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            rows, content = _Cache(folder, entry, settings).rows(workers=workers, show_progress=show_progress)
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder}: {error.strerror}; give a folder that can be written"
        ) from error
    return _to_index(rows, entry=entry, content=content, facts=facts)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file; file systems without locks let several ranks do the same work at once."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s: no file locks here (%s); each rank does the same work", path, error)
        yield


def describe_settings(entry: DatasetEntry, settings: SampleSettings) -> dict[str, Any]:
    """Everything but the file's content that a measurement depends on, by a name that a person understands."""
    tiling = dataclasses.asdict(dataset_tiling(settings, entry))
    template = json.dumps(dataclasses.asdict(settings.text.template), sort_keys=True)
    is_limited = settings.long_samples in ("split", "bad", "refuse")
    return {
        "format": _FORMAT,
        "entry": {
            name: value
            for name, value in dataclasses.asdict(entry).items()
            if name not in ("repeat_time", "data_augment")
        },
        **{f"tiling.{name}": value for name, value in tiling.items()},
        **{f"video.{name}": value for name, value in dataclasses.asdict(settings.video).items()},
        "max_image_pixels": settings.max_image_pixels,
        "tokenizer": settings.text.tokenizer.fingerprint,
        "template": f"{settings.text.template.name} {hashlib.sha256(template.encode()).hexdigest()[:8]}",
        "tokens_per_tile": settings.text.tokens_per_tile,
        "max_sample_tokens": settings.text.max_tokens,
        # bad and refuse measure alike; what follows from it is the plan's decision
        "long_samples": "bad" if settings.long_samples == "refuse" else settings.long_samples,
        "max_sample_tiles": settings.max_pack_tiles if is_limited else 0,
    }


def _to_index(
    rows: IndexRows, *, entry: DatasetEntry, content: str, facts: Mapping[str, Any]
) -> DatasetIndex:
    arrays = rows.arrays
    names = ("offsets", "line_numbers", "num_tokens", "num_supervised", "num_tiles", "sizes", "units")
    return DatasetIndex(
        entry=entry,
        content=content,
        settings=facts,
        first_image=np.concatenate([[0], np.cumsum(arrays["num_images"], dtype=np.int64)]),
        num_cut=int((arrays["num_uncut_tokens"] > arrays["num_tokens"]).sum()),
        bad=rows.bad,
        **{name: arrays[name] for name in names},
    )


class _Cache:
    """Versions of one index; the caller holds the lock.

    rows-CONTENT-BAD/    arrays of a whole file with that many bad lines; the newest wins
    stat.json            which version is in force, and size and time of the file when it was last looked at
    parts-CONTENT/       an unfinished pass
    """

    def __init__(self, folder: Path, entry: DatasetEntry, settings: SampleSettings) -> None:
        self._folder, self._entry, self._settings = folder, entry, settings

    def rows(self, *, workers: int, show_progress: bool) -> tuple[IndexRows, str]:
        """The rows of the file as it is now, and its content's digest."""
        stat = self._stat()
        known = self._known()
        if known is not None and known[1]["stat"] == stat:
            return self._retried(*known, stat)
        scan = scan_file(self._entry.annotation, prefix=known[1]["size"] if known else 0)
        if known is not None and scan.digest == known[1]["content"]:
            rows, content = self._retried(*known, stat)
            return self._stored(rows, {**known[1], "stat": stat}), content
        kept, blocks = no_rows(), list(scan.blocks)
        if known is not None and scan.prefix_digest == known[1]["content"]:
            covered, lines = known[1]["covered"], known[1]["covered_lines"]
            kept = known[0].before(covered)
            blocks = [
                byte_range(max(block.start, covered), block.end, max(block.first_line, lines + 1), behind)
                for block in scan.blocks
                if block.end > covered
                for behind in [block.first_line + block.num_lines]
            ]
            _log.info("%s: grew; %d lines are known", self._entry.annotation, lines)
        parts = PartFolder(self._folder / f"parts-{scan.digest[:16]}")
        total = sum(block.num_lines for block in blocks)
        with _progress(self._entry, total, show_progress) as progress:
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
                _log.warning("%s: damaged index (%s); the data is measured again", folder, error)
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
                measure_into(
                    collected,
                    file.readline(),
                    bad.offset,
                    bad.line_number,
                    measurer=measurer,
                    entry=self._entry,
                )
        if len(collected.bad) == len(rows.bad):
            return rows, facts["content"]
        still_bad = {bad.offset for bad in collected.bad}
        _log.info("%s: %d bad lines are good now", self._entry.annotation, len(rows.bad) - len(collected.bad))
        good = IndexRows(arrays=collected.rows().arrays, bad=())
        kept = rows.without_bad({bad.offset for bad in rows.bad} - still_bad)
        return self._stored(sorted_rows(concatenate([kept, good])), {**facts, "stat": stat}), facts["content"]

    def _clean(self, scan: FileScan) -> None:
        """Parts of passes over other contents are of no use any more."""
        for folder in self._folder.glob("parts-*"):
            if folder.name != f"parts-{scan.digest[:16]}":
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(entry: DatasetEntry, total: int, show: bool) -> Iterator[Progress]:
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
            _log.info(
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
    _log.info("%s: measured %d lines in %.1f s, %d bad", entry.annotation, num_done, seconds, num_bad)
