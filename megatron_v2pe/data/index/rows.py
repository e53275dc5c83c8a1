"""Measured lines as arrays: made by workers, joined, written to files that every rank maps instead of reading.

rows of a byte range --concatenate--> rows of a file --write_rows--> folder of .npy + facts.json --open_rows--> mmap
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.files import commit_folder, write_atomic
from megatron_v2pe.data.samples.formats import SYSTEM_NOTE
from megatron_v2pe.data.samples.measure import MeasuredSample

_FACTS = "facts.json"
_MOST_NOTE_SETS = 2000
_NPY_HEADER_BYTES = 128  # of an array without elements, which cannot be mapped
_TYPES = {
    "offsets": np.int64,
    "line_numbers": np.int64,
    "num_tokens": np.int64,
    "num_uncut_tokens": np.int64,
    "num_supervised": np.int64,
    "num_tiles": np.int64,
    "num_images": np.int32,
    "num_media": np.int32,
    "notes": np.int32,
    "units": np.int32,
    "sizes": np.int32,
    "media_images": np.int32,
}
# Arrays of all samples' images or media, one after the other, and the array that counts them by sample.
_FLAT = {"sizes": "num_images", "media_images": "num_media"}
_WIDTHS = {"units": 2, "sizes": 2}


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A line that cannot be used, and why.

    Attributes:
        sample_id: `data set:line`.
        line_number: 1-based.
        message: starts with `file:line`.
        kind: `long` is a sound sample that exceeds a limit, `broken` anything else.
        offset: byte offset of the line.
    """

    sample_id: str
    line_number: int
    message: str
    kind: Literal["broken", "long"] = "broken"
    offset: int = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexRows:
    """n samples with I images in all, in the order of the file.

    Attributes:
        arrays: by the names of `_TYPES`; [n], `units` [n, 2], `sizes` [I, 2], and `media_images`, images of each medium
            of the samples with videos (`num_media` is 0 for the others, each of whose media is one image).
        bad: lines that cannot be used, in the order of the file.
        note_sets: what array `notes` counts: the notes of a sample; of a long one's parts only the first has them.
    """

    arrays: Mapping[str, NDArray]
    bad: tuple[BadSample, ...]
    note_sets: tuple[tuple[str, ...], ...] = ((),)

    def __len__(self) -> int:
        return len(self.arrays["offsets"])

    def before(self, offset: int) -> IndexRows:
        """The rows of lines that begin before a byte offset."""
        count = int(np.searchsorted(self.arrays["offsets"], offset))
        bad = tuple(bad for bad in self.bad if bad.offset < offset)
        return replace(self.slice({}, count), bad=bad)

    def slice(self, starts: dict[str, int], count: int) -> IndexRows:
        """The next `count` rows of an iteration from the first row on, with none of the bad lines.

        Args:
            starts: where the iteration is in each array; empty at its beginning, moved on here.
            count: rows.
        """
        first = starts.get("offsets", 0)
        counts = dict.fromkeys(_TYPES, count)
        for name, counter in _FLAT.items():
            counts[name] = int(self.arrays[counter][first : first + count].sum())
        arrays = {}
        for name, values in self.arrays.items():
            start = starts.get(name, 0)
            arrays[name] = values[start : start + counts[name]]
            starts[name] = start + counts[name]
        return IndexRows(arrays=arrays, bad=(), note_sets=self.note_sets)

    def without_bad(self, offsets: set[int]) -> IndexRows:
        """The same rows, with some of the bad lines removed from the list."""
        return replace(self, bad=tuple(bad for bad in self.bad if bad.offset not in offsets))


class RowCollector:
    """Gathers the samples of lines."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, MeasuredSample]] = []
        self.bad: list[BadSample] = []

    def add(self, offset: int, line_number: int, samples: Sequence[MeasuredSample]) -> None:
        """Add the samples of one line."""
        self._rows += [(offset, line_number, sample) for sample in samples]

    def rows(self) -> IndexRows:
        """What was gathered, as arrays."""
        measured = [sample.measurement for _, _, sample in self._rows]
        columns: dict[str, list[Any]] = {
            "offsets": [offset for offset, _, _ in self._rows],
            "line_numbers": [number for _, number, _ in self._rows],
            "num_images": [sum(map(len, each.sizes)) for each in measured],
            "units": [sample.units for _, _, sample in self._rows],
            "sizes": [size for each in measured for own in each.sizes for size in own],
        }
        media = [_listed_counts(each.sizes) for each in measured]
        columns["num_media"] = [len(counts) for counts in media]
        columns["media_images"] = [count for counts in media for count in counts]
        note_sets: dict[tuple[str, ...], int] = {(): 0}
        columns["notes"] = [_note_set(note_sets, each.notes) for each in measured]
        for name in ("num_tokens", "num_uncut_tokens", "num_supervised", "num_tiles"):
            columns[name] = [getattr(each, name) for each in measured]
        return IndexRows(
            arrays={name: _array(name, values) for name, values in columns.items()},
            bad=tuple(self.bad),
            note_sets=tuple(note_sets),
        )


def _listed_counts(sizes: Sequence[Sequence[Any]]) -> list[int]:
    """Images of each medium; none where each is one image."""
    counts = [len(own) for own in sizes]
    return [] if all(count == 1 for count in counts) else counts


def _note_set(note_sets: dict[tuple[str, ...], int], notes: tuple[str, ...]) -> int:
    """Number of a set of notes; a file with a key of its own in each record does not make thousands of them."""
    if notes not in note_sets and len(note_sets) >= _MOST_NOTE_SETS:
        kept = (note for note in notes if not note.startswith(("unread:", SYSTEM_NOTE)))
        system = (f"{SYSTEM_NOTE}(others)",) if any(note.startswith(SYSTEM_NOTE) for note in notes) else ()
        notes = (*kept, "unread:(others)", *system)
        if notes not in note_sets and len(note_sets) >= 2 * _MOST_NOTE_SETS:
            notes = ("unread:(others)", *system)
    return note_sets.setdefault(notes, len(note_sets))


def _array(name: str, values: Sequence[Any]) -> NDArray:
    array = np.array(values, dtype=_TYPES[name])
    return array.reshape(-1, _WIDTHS[name]) if name in _WIDTHS else array


def no_rows() -> IndexRows:
    """Rows of an empty file."""
    return RowCollector().rows()


def concatenate(ranges: Sequence[IndexRows]) -> IndexRows:
    """Rows of consecutive byte ranges as one."""
    ranges = [no_rows(), *ranges]
    arrays = {name: np.concatenate([rows.arrays[name] for rows in ranges]) for name in _TYPES}
    note_sets: dict[tuple[str, ...], int] = {(): 0}
    numbers = []
    for rows in ranges:
        known = np.array([_note_set(note_sets, notes) for notes in rows.note_sets], dtype=_TYPES["notes"])
        numbers.append(known[rows.arrays["notes"]])
    arrays["notes"] = np.concatenate(numbers)
    bad = tuple(bad for rows in ranges for bad in rows.bad)
    return IndexRows(arrays=arrays, bad=bad, note_sets=tuple(note_sets))


def sorted_rows(rows: IndexRows) -> IndexRows:
    """The same rows in the order of the file; parts of a sample stay in order."""
    order = np.argsort(rows.arrays["offsets"], kind="stable")
    arrays = {name: values[order] for name, values in rows.arrays.items() if name not in _FLAT}
    for name, counter in _FLAT.items():
        counts = rows.arrays[counter].astype(np.int64)
        firsts = np.cumsum(counts) - counts
        places = [np.arange(firsts[row], firsts[row] + counts[row]) for row in order.tolist() if counts[row]]
        values = rows.arrays[name]
        arrays[name] = values[np.concatenate(places)] if places else values[:0]
    return replace(rows, arrays=arrays, bad=tuple(sorted(rows.bad, key=lambda bad: bad.offset)))


def write_rows(folder: Path, rows: IndexRows, facts: Mapping[str, Any]) -> None:
    """Write rows and some facts as a folder, whole or not at all; an existing folder is kept as it is.

    Raises:
        OSError: it cannot be written.
    """
    if folder.exists():
        return
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a process of the same number that was killed
    aside.mkdir(parents=True)
    for name, values in rows.arrays.items():
        np.save(aside / f"{name}.npy", values)
    bad = [dataclasses.asdict(sample) for sample in rows.bad]
    stored = {**facts, "bad": bad, "note_sets": rows.note_sets}
    (aside / _FACTS).write_text(json.dumps(stored), encoding="utf-8")
    commit_folder(aside, folder)


def open_rows(folder: Path) -> tuple[IndexRows, dict[str, Any]]:
    """Rows of a folder, mapped into memory, and its facts.

    Raises:
        OSError, ValueError, KeyError, EOFError: missing or damaged.
    """
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    arrays = {}
    for name in _TYPES:
        path = folder / f"{name}.npy"
        is_empty = path.stat().st_size <= _NPY_HEADER_BYTES
        arrays[name] = np.load(path, mmap_mode=None if is_empty else "r", allow_pickle=False)
    return _checked(arrays, facts, folder), facts


def write_part(path: Path, rows: IndexRows, facts: Mapping[str, Any]) -> None:
    """Write rows and some facts as one file, which is flushed to the disk once.

    Raises:
        OSError: it cannot be written.
    """
    bad = [dataclasses.asdict(sample) for sample in rows.bad]
    text = json.dumps({**facts, "bad": bad, "note_sets": rows.note_sets}).encode()
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"facts": np.frombuffer(text, dtype=np.uint8), **rows.arrays}
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def read_part(path: Path) -> tuple[IndexRows, dict[str, Any]]:
    """Rows and facts of a file of `write_part`.

    Raises:
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: missing or damaged.
    """
    with np.load(path, allow_pickle=False) as stored:
        facts = json.loads(stored["facts"].tobytes())
        return _checked({name: stored[name] for name in _TYPES}, facts, path), facts


def _checked(arrays: Mapping[str, NDArray], facts: dict[str, Any], path: Path) -> IndexRows:
    """Rows of arrays that fit together; `bad` is removed from the facts."""
    for name, kind in _TYPES.items():
        if arrays[name].dtype != kind:
            raise ValueError(f"{path}: {name} holds {arrays[name].dtype}, not {np.dtype(kind)}")
    if len({len(values) for name, values in arrays.items() if name not in _FLAT}) != 1:
        raise ValueError(f"{path}: arrays of different lengths")
    note_sets = tuple(tuple(notes) for notes in facts.pop("note_sets"))
    notes = arrays["notes"]
    if len(notes) and not 0 <= int(notes.min()) <= int(notes.max()) < len(note_sets):
        raise ValueError(f"{path}: notes that do not exist")
    bad = tuple(BadSample(**sample) for sample in facts.pop("bad"))
    return IndexRows(arrays=arrays, bad=bad, note_sets=note_sets)
