"""MM-NIAH's axes: eleven ranges of length, five bands of depth, and the two means over them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_v2pe.evaluation.benchmarks.base import ScoreCell, mean

LENGTHS = (1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 40000, 48000, 64000)
LONG_LENGTHS = (64000, 128000, 256000, 512000)  # lower ends of the 128K, 256K, 512K and 1M files
NUM_BANDS = 5
_BAND = 0.2


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A scored needle.

    Attributes:
        group: task.
        length: nominal tokens of the document.
        depth: of the needle, or of each of several.
        value: 0..1.
    """

    group: str
    length: int
    depth: float | Sequence[float]
    value: float


def band_of(depth: float | Sequence[float]) -> int:
    """Band 0..4 of a depth 0..1; several needles count by their mean, and 1.0 lies in the last band.

    As published: `int(depth / 0.2)`, so that 0.6 lies in band 2 in floating point.
    """
    if not isinstance(depth, (int, float)):
        depth = sum(depth) / len(depth)
    return int((0.99 if depth == 1.0 else depth) / _BAND)


def range_of(length: int, lengths: Sequence[int]) -> int:
    """Index of a length's range, -1 below the first.

    Example: 999, 1000, 1999, 2000, 64000 of `LENGTHS` give -1, 0, 0, 1, 10.
    """
    return bisect_right(lengths, length) - 1


def cells_of(placed: Iterable[Placed], lengths: Sequence[int]) -> tuple[ScoreCell, ...]:
    """Cells that have a sample; those below the first length are left out."""
    sums: dict[tuple[str, int, int], list[float]] = {}
    for item in placed:
        column = range_of(item.length, lengths)
        if column < 0:
            continue
        total = sums.setdefault((item.group, column, band_of(item.depth)), [0.0, 0.0])
        total[0] += item.value
        total[1] += 1
    return tuple(
        ScoreCell(group=g, length=lengths[c], depth=round(b * _BAND, 1), total=t, count=int(n))
        for (g, c, b), (t, n) in sorted(sums.items())
    )


def official_bins(cells: Sequence[ScoreCell], group: str, lengths: Sequence[int]) -> list[float]:
    """Score of each length as published: mean over its five bands, an empty one counted as zero; six digits."""
    means = {(c.length, c.depth): c.mean for c in cells if c.group == group}
    return [
        round(sum(value for (n, _), value in means.items() if n == length) / NUM_BANDS, 6)
        for length in lengths
    ]


def clean_bins(cells: Sequence[ScoreCell], group: str, lengths: Sequence[int]) -> list[float]:
    """Score of each length over the bands that have a sample; NaN where none has."""
    return [mean([c.mean for c in cells if c.group == group and c.length == length]) for length in lengths]
