"""Lengths before pixels: each annotation file is measured once, and the result is kept.

    a.jsonl + image headers --measure_line--> offsets, tokens, tiles, image sizes, bad lines --> cache_dir/*.npz

The cache is keyed by the file's identity (path, size, modification time) and by every setting that changes a
length. Ranks that start together take turns at a lock; the first one measures, the others read. The folder of
the data is never written to.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.logging import get_logger
from megatron_v2pe.data.meta import DatasetEntry
from megatron_v2pe.data.samples import Measurement, SampleSettings, Size, dataset_tiling, measure_line
from megatron_v2pe.v2pe.layout import Int64Array

_log = get_logger(__name__)
_FORMAT = 1
_ARRAYS = ("offsets", "line_numbers", "num_tokens", "num_supervised", "num_tiles", "first_image", "sizes")


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A line that cannot be used, and why."""

    sample_id: str
    line_number: int
    message: str


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetIndex:
    """Measured lines of one annotation file, n good ones with I images in all.

    Attributes:
        entry: the data set.
        key: digest of what the measurements depend on.
        offsets: int64 [n], byte offset of each line.
        line_numbers: int64 [n], 1-based.
        num_tokens: int64 [n], tokens of each sample after the cut.
        num_supervised: int64 [n], supervised tokens.
        num_tiles: int64 [n], tiles of all images.
        first_image: int64 [n+1], where the images of each line start in `sizes`.
        sizes: int64 [I, 2], width and height.
        bad: lines that cannot be used.
    """

    entry: DatasetEntry
    key: str
    offsets: Int64Array
    line_numbers: Int64Array
    num_tokens: Int64Array
    num_supervised: Int64Array
    num_tiles: Int64Array
    first_image: Int64Array
    sizes: NDArray[np.int64]
    bad: tuple[BadSample, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def num_records(self) -> int:
        """Lines of the file, good and bad."""
        return len(self.offsets) + len(self.bad)

    def image_sizes(self, row: int) -> list[Size]:
        """(width, height) of each image of a line."""
        rows = self.sizes[self.first_image[row] : self.first_image[row + 1]]
        return [(int(width), int(height)) for width, height in rows]

    def sample_id(self, row: int) -> str:
        """Identity of a line."""
        return f"{self.entry.name}:{self.line_numbers[row]}"


def index_dataset(entry: DatasetEntry, *, settings: SampleSettings, cache_dir: str | Path) -> DatasetIndex:
    """Measurements of one data set, from the cache if they are there.

    Bad lines of a cached index are tried again, so that a repaired image or line counts at the next start.

    Args:
        entry: see `meta.read_meta`.
        settings: see `samples.sample_settings`.
        cache_dir: folder of our own; created when missing.

    Raises:
        DataError: the annotation file or the cache folder cannot be used.
    """
    key = _key(entry, settings)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", entry.name)[:80]
    path = Path(cache_dir) / f"{name}-{key}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            index = _read(path, entry, key)
            if index is None or _is_repaired(index, settings):
                index = _measure(entry, key, settings)
                write_atomic(path, _to_bytes(index))
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {path}: {error.strerror}; give a folder that can be written"
        ) from error
    return index


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file; file systems without locks let several ranks measure at once."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            _log.warning("%s: no file locks here (%s); each rank measures the data itself", path, error)
        yield


def _key(entry: DatasetEntry, settings: SampleSettings) -> str:
    """Digest of the file's identity and of the settings that change a measurement."""
    try:
        status = os.stat(entry.annotation)
    except OSError as error:
        raise DataError(f"{entry.annotation}: {error.strerror}") from None
    facts = {
        "format": _FORMAT,
        "file": [os.path.abspath(entry.annotation), status.st_size, status.st_mtime_ns],
        "roots": [entry.root, entry.root2, entry.http_root],
        "tiling": dataclasses.asdict(dataset_tiling(settings, entry)),
        "max_image_pixels": settings.max_image_pixels,
        "tokenizer": settings.text.tokenizer.fingerprint,
        "template": dataclasses.asdict(settings.text.template),
        "tokens_per_tile": settings.text.tokens_per_tile,
        "max_tokens": settings.text.max_tokens,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _measure(entry: DatasetEntry, key: str, settings: SampleSettings) -> DatasetIndex:
    """Go through the annotation file once."""
    rows: list[tuple[int, int]] = []
    measured: list[Measurement] = []
    bad: list[BadSample] = []
    offset, started = 0, time.monotonic()
    reported = started
    with open(entry.annotation, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    measured.append(measure_line(line, number, entry=entry, settings=settings))
                    rows.append((offset, number))
                except DataError as error:
                    bad.append(
                        BadSample(sample_id=f"{entry.name}:{number}", line_number=number, message=str(error))
                    )
            offset += len(line)
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                _log.info("%s: measured %d lines, %d bad", entry.annotation, number, len(bad))
    seconds = time.monotonic() - started
    _log.info("%s: measured %d samples in %.1f s, %d bad", entry.annotation, len(rows), seconds, len(bad))
    sizes = [size for measurement in measured for size in measurement.sizes]
    counts = [len(measurement.sizes) for measurement in measured]
    lines = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return DatasetIndex(
        entry=entry,
        key=key,
        offsets=lines[:, 0],
        line_numbers=lines[:, 1],
        num_tokens=np.array([each.num_tokens for each in measured], dtype=np.int64),
        num_supervised=np.array([each.num_supervised for each in measured], dtype=np.int64),
        num_tiles=np.array([each.num_tiles for each in measured], dtype=np.int64),
        first_image=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        bad=tuple(bad),
    )


def _is_repaired(index: DatasetIndex, settings: SampleSettings) -> bool:
    """Whether a line that was bad when the index was made is usable now."""
    wanted = {sample.line_number for sample in index.bad}
    if not wanted:
        return False
    with open(index.entry.annotation, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number in wanted:
                try:
                    measure_line(line, number, entry=index.entry, settings=settings)
                except DataError:
                    continue
                return True
    return False


def _to_bytes(index: DatasetIndex) -> bytes:
    buffer = io.BytesIO()
    bad = json.dumps([dataclasses.asdict(sample) for sample in index.bad]).encode()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    np.savez(buffer, bad=np.frombuffer(bad, dtype=np.uint8), **arrays)
    return buffer.getvalue()


def _read(path: Path, entry: DatasetEntry, key: str) -> DatasetIndex | None:
    """A cached index; None when there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            bad = json.loads(stored["bad"].tobytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        _log.warning("%s: damaged index (%s); the data is measured again", path, error)
        return None
    return DatasetIndex(entry=entry, key=key, bad=tuple(BadSample(**sample) for sample in bad), **arrays)
