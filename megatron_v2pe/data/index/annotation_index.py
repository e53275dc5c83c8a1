"""Lengths before pixels: each annotation file is measured once, and the result is kept.

    a.jsonl --scan--> hash, blocks --measure (text, image headers)--> rows, bad lines --> cache_dir/NAME-KEY/

The cache folder belongs to a path and to every setting that changes a length; `cache` keeps the versions in it. Ranks
that start together wait at a lock; the first one measures, the others map the same arrays. The folder of the data is
never written to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.cache import IndexCache, locked
from megatron_v2pe.data.index.rows import BadSample, IndexRows
from megatron_v2pe.data.media.cut import Size
from megatron_v2pe.data.samples.notes import Notice, count_notes, system_texts
from megatron_v2pe.data.samples.settings import SampleSettings, dataset_tiling
from megatron_v2pe.data.samples.split import Units
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.v2pe.layout import Int64Array

_FORMAT = 3
_NOTES = 2  # version of what is noted beside lengths: no order of samples depends on it, but a cache has to have it


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
        first_medium: int64 [n+1], where the media of each sample start in `media_images`.
        media_images: int [M], images of each medium of the samples with videos.
        units: int [n, 2], which part of the line each sample is, see `split`.
        num_cut: samples whose text was cut.
        bad: lines that cannot be used.
        systems: system texts that records have of their own, and how many have each.
        notices: what was read otherwise than it is written, or not at all, and what images lose.
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
    first_medium: Int64Array
    media_images: NDArray
    units: NDArray
    num_cut: int
    bad: tuple[BadSample, ...]
    notices: tuple[Notice, ...] = ()
    systems: Mapping[str, int] = field(default_factory=dict)

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

    def media_sizes(self, row: int) -> tuple[tuple[Size, ...], ...]:
        """(width, height) of each image of each medium of a sample."""
        sizes = self.image_sizes(row)
        counts = self.media_images[self.first_medium[row] : self.first_medium[row + 1]].tolist()
        ends = np.cumsum(counts or [1] * len(sizes)).tolist()
        return tuple(tuple(sizes[low:high]) for low, high in zip([0, *ends], ends, strict=False))

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
    kept = {**facts, "notes": _NOTES}
    key = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", entry.name)[:80]
    folder = Path(cache_dir) / f"{name}-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            rows, content = IndexCache(folder, entry, settings).rows(
                workers=workers, show_progress=show_progress
            )
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder}: {error.strerror}; give a folder that can be written"
        ) from error
    return _to_index(rows, entry=entry, content=content, facts=facts)


def describe_settings(entry: DatasetEntry, settings: SampleSettings) -> dict[str, Any]:
    """Everything but the file's content that a measurement depends on, by a name that a person understands."""
    tiling = dataclasses.asdict(dataset_tiling(settings, entry))
    # Empty texts are left out: a part that a template does not have must not make its data another.
    parts = {name: part for name, part in dataclasses.asdict(settings.text.template).items() if part != ""}
    template = json.dumps(parts, sort_keys=True)
    is_limited = settings.long_samples in ("split", "bad", "refuse")
    return {
        "format": _FORMAT,
        "entry": {
            name: value
            for name, value in dataclasses.asdict(entry).items()
            if name not in ("repeat_time", "data_augment")
        },
        **{f"tiling.{name}": value for name, value in tiling.items()},
        **{f"video.{name}": value for name, value in dataclasses.asdict(settings.media.video).items()},
        "max_image_pixels": settings.media.max_pixels,
        "exif": settings.media.exif,
        "control_tokens": settings.text.control_tokens,
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
    names = (
        "offsets",
        "line_numbers",
        "num_tokens",
        "num_supervised",
        "num_tiles",
        "sizes",
        "units",
        "media_images",
    )
    return DatasetIndex(
        entry=entry,
        content=content,
        settings=facts,
        first_image=np.concatenate([[0], np.cumsum(arrays["num_images"], dtype=np.int64)]),
        first_medium=np.concatenate([[0], np.cumsum(arrays["num_media"], dtype=np.int64)]),
        notices=count_notes(arrays["notes"], arrays["line_numbers"], rows.note_sets),
        systems=system_texts(arrays["notes"], rows.note_sets),
        num_cut=int((arrays["num_uncut_tokens"] > arrays["num_tokens"]).sum()),
        bad=rows.bad,
        **{name: arrays[name] for name in names},
    )
