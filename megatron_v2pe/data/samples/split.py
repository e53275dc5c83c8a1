"""Long samples in parts: cut between rounds and before images, never inside a text or an image.

    round     a question and its answer; stays whole unless it has several images
    question  frame <image> page <image> page <image> frame  ->  parts with some of the images; the text before the
              first and after the last image frames the question and is repeated, and so is the answer
    answer    text <image> text <image> text                 ->  runs of it, each after the whole question; a text
              from `pretrain` is cut in the same way

A part is named by its first and last unit, which depend on the text of the record alone; so what was measured is found
again without measuring. A question about all images of a long round is asked of each part: where that would train
wrong answers, `data.long_samples: refuse` or `bad` is the right policy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.samples.records import Record
from megatron_v2pe.data.text.templates import Turn

Units = tuple[int, int]
WHOLE: Units = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A question with its answer, and where its units and images are in the record."""

    turns: tuple[Turn, ...]
    first_unit: int
    first_image: int

    @cached_property
    def counts(self) -> list[int]:
        """Images of each turn."""
        return [turn.value.count(IMAGE_PLACEHOLDER) for turn in self.turns]

    @property
    def cut_turn(self) -> int | None:
        """The turn that may be cut: the answer if it shows images, else a question with several; None for neither.

        Nor is a round cut in which a function returned something.
        """
        if any(turn.role == "tool" for turn in self.turns):
            return None
        counts = self.counts
        if len(counts) > 1 and counts[1] > 1:
            return 1
        return 0 if counts[0] > 1 and sum(counts[1:]) == 0 else None

    @cached_property
    def num_units(self) -> int:
        """Units that it can be cut into."""
        return 1 if self.cut_turn is None else self.counts[self.cut_turn]


def rounds_of(record: Record) -> list[Round]:
    """Questions with their answers, in order; made once for a record of thousands of turns."""
    return list(_rounds(record))


def _rounds(record: Record) -> Iterator[Round]:
    unit = image = 0
    turns = record.turns
    starts = [place for place, turn in enumerate(turns) if place == 0 or turn.role == "human"]
    for start, stop in pairwise([*starts, len(turns)]):
        each = Round(turns=turns[start:stop], first_unit=unit, first_image=image)
        yield each
        unit += each.num_units
        image += sum(each.counts)


def part_of(
    record: Record, units: Units, *, rounds: Sequence[Round] | None = None
) -> tuple[Record, list[int]]:
    """Some consecutive units of a record as a record of its own.

    Args:
        record: see `records.parse_line`; each of its media is one image, unless `units` is `WHOLE`.
        units: half-open range; `WHOLE` is the record itself.
        rounds: of the record, if they are known.

    Returns:
        the part, whose `sample_id` names the units, and the numbers of its images.
    """
    if units == WHOLE:
        return record, list(range(len(record.media)))
    turns: list[Turn] = []
    images: list[int] = []
    rounds = rounds_of(record) if rounds is None else rounds
    first = bisect_right(rounds, units[0], key=lambda each: each.first_unit) - 1
    for each in rounds[max(first, 0) :]:
        if each.first_unit >= units[1]:
            break
        low = max(units[0] - each.first_unit, 0)
        high = min(units[1] - each.first_unit, each.num_units)
        if low < high:
            part_turns, part_images = _cut_round(each, low, high)
            turns += part_turns
            images += part_images
    part = replace(
        record,
        sample_id=f"{record.sample_id}[{units[0]}:{units[1]}]",
        turns=tuple(turns),
        media=tuple(record.media[image] for image in images),
    )
    return part, images


def _cut_round(each: Round, low: int, high: int) -> tuple[list[Turn], list[int]]:
    """Units low..high-1 of a round, and its images."""
    counts, place = each.counts, each.cut_turn
    if place is None or (low, high) == (0, each.num_units):
        return list(each.turns), list(range(each.first_image, each.first_image + sum(counts)))
    turn = each.turns[place]
    before, *after = turn.value.split(IMAGE_PLACEHOLDER)
    middle = "".join(IMAGE_PLACEHOLDER + text for text in after[low:high])
    first = each.first_image + sum(counts[:place])
    images = list(range(first + low, first + high))
    if place == 0 and turn.role != "pretrain":
        frame = "" if high == len(after) else after[-1]
        return [replace(turn, value=before + middle + frame), *each.turns[1:]], images
    question = list(range(each.first_image, first))
    opening = before if low == 0 else ""
    return [*each.turns[:place], replace(turn, value=opening + middle)], question + images


def split_units(record: Record, rounds: Sequence[Round], *, fits: Callable[[Units], bool]) -> Sequence[Units]:
    """Cut a record into the longest parts that fit, from its beginning on.

    Args:
        record: a record that does not fit as a whole.
        rounds: of the record.
        fits: whether a range of units is short enough; asked about a dozen times for each part.

    Raises:
        DataError: a single unit does not fit.
    """
    total, first = sum(each.num_units for each in rounds), 0
    parts: list[Units] = []
    while first < total:
        low, high = first, total + 1  # low units fit (or none), high do not
        while high - low > 1:
            middle = min((low + high) // 2, 2 * low - first + 1)  # short ranges first: long ones cost most
            low, high = (middle, high) if fits((first, middle)) else (low, middle)
        if low == first:
            raise DataError(
                f"{record.where}: is too long, and its part {first + 1} of {total} is as well; text is not cut, only "
                "rounds and images are set apart"
            )
        parts.append((first, low))
        first = low
    return parts
