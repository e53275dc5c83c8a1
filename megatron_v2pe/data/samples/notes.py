"""What the index counts beside lengths: keys that are not read, names that were understood, images that lose something.

record.notes, traits of image headers --> ("unread:uid", "image:alpha x 2") per sample --> Notice per data set
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.data.media.medium import ImageHeader
from megatron_v2pe.data.media.traits import TRAITS, trait_text
from megatron_v2pe.data.samples.formats import OPENING_NOTE, SYSTEM_NOTE, note_text

_IMAGE = "image:"
_TIMES = " x "


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A note and how often it occurs in a data set.

    Attributes:
        note: as `formats.NativeRecord.notes` has it, or `image:` and a trait.
        count: records; images for a trait.
        line_number: first line that has it.
    """

    note: str
    count: int
    line_number: int

    @property
    def is_lost(self) -> bool:
        """Whether something of the data is lost by rule: it is said where the run starts."""
        return self.note.startswith((_IMAGE, "unread:", OPENING_NOTE))


def image_notes(headers: Sequence[Sequence[ImageHeader]]) -> tuple[str, ...]:
    """Notes on the traits of a record's images: `image:alpha x 2`."""
    found = [trait for own in headers for header in own for trait in header.traits]
    if not found:
        return ()
    return tuple(f"{_IMAGE}{trait}{_TIMES}{found.count(trait)}" for trait in TRAITS if trait in found)


def count_notes(
    notes: NDArray, line_numbers: NDArray, note_sets: Sequence[Sequence[str]]
) -> tuple[Notice, ...]:
    """Notices of a data set.

    Args:
        notes: int [n], number of the set of notes of each sample.
        line_numbers: int [n], 1-based.
        note_sets: the sets.
    """
    counts = (
        np.bincount(notes, minlength=len(note_sets)) if len(notes) else np.zeros(len(note_sets), dtype=int)
    )
    found: dict[str, tuple[int, int]] = {}
    systems = len({text for each in note_sets for text in each if text.startswith(SYSTEM_NOTE)})
    for number, each in enumerate(note_sets):
        if not each or not counts[number]:
            continue
        first = int(line_numbers[notes == number].min())
        for text in (_counted_system(text, systems) for text in each):
            note, _, times = text.partition(_TIMES) if text.startswith(_IMAGE) else (text, "", "")
            count, line = found.get(note, (0, first))
            found[note] = (count + int(counts[number]) * int(times or 1), min(line, first))
    return tuple(
        Notice(note=note, count=count, line_number=line) for note, (count, line) in sorted(found.items())
    )


def _counted_system(note: str, number: int) -> str:
    """One note for all system texts of a data set, which says how many there are."""
    return f"{SYSTEM_NOTE}{number} of their own" if note.startswith(SYSTEM_NOTE) else note


def system_texts(notes: NDArray, note_sets: Sequence[Sequence[str]]) -> dict[str, int]:
    """System texts that records have of their own, and how many have each.

    Args:
        notes: int [n], number of the set of notes of each sample.
        note_sets: the sets.
    """
    counts = np.bincount(notes, minlength=len(note_sets)) if len(notes) else np.zeros(len(note_sets), int)
    found: dict[str, int] = {}
    for count, each in zip(counts.tolist(), note_sets, strict=True):
        for text in (note.removeprefix(SYSTEM_NOTE) for note in each if note.startswith(SYSTEM_NOTE)):
            if count:
                found[text] = found.get(text, 0) + count
    return found


def notice_text(notice: Notice, *, annotation: str, exif: str, alpha: str) -> str:
    """One line on a notice.

    Args:
        notice: of the data set.
        annotation: its file.
        exif: `data.exif`.
        alpha: `data.alpha`.
    """
    place = f"{annotation}:{notice.line_number}"
    if notice.note.startswith(_IMAGE):
        text = trait_text(notice.note.removeprefix(_IMAGE), exif=exif, alpha=alpha)
        return f"{notice.count:,} images {text}, first {place}"
    return note_text(notice.note, notice.count, place)
