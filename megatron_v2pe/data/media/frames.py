"""Which frames of a video a sample shows: one from each of `count` equal intervals.

    10 frames, count 4   intervals [0,2) [2,5) [5,7) [7,10)   rand: one frame of each, anew in every draw
                                                              middle: 0 3 5 8

The count is drawn once for a sample, from its identity alone, because a plan needs lengths that stay; which frame
represents its interval is drawn in each epoch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_v2pe.v2pe.strides import sample_generator

FrameSampling = Literal["rand", "middle"]
_MIDDLE = -1.0  # place of the middle frame, which is not a fraction of the interval: [0, 2) has 0


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """How videos are sampled.

    Attributes:
        min_frames: fewest frames, fewer only where a video has fewer.
        max_frames: most frames.
        sampling: `rand` or `middle`.
        max_seconds: longest part of a video that is searched for frames.
    """

    min_frames: int
    max_frames: int
    sampling: FrameSampling
    max_seconds: float


DEFAULT_RULE = VideoRule(min_frames=4, max_frames=20, sampling="rand", max_seconds=7200.0)


def wanted_frames(sample_id: str, rule: VideoRule) -> int:
    """How many frames a sample wants: uniform in min_frames..max_frames, the same in every run."""
    generator = sample_generator(0, 0, f"{sample_id}/frames")
    return int(generator.integers(rule.min_frames, rule.max_frames + 1))


def draw_places(rule: VideoRule, count: int, generator: np.random.Generator) -> tuple[float, ...]:
    """Where in its interval each of `count` frames lies, for one draw: a fraction in [0, 1), or the middle."""
    if rule.sampling == "middle":
        return (_MIDDLE,) * count
    return tuple(generator.random(count).tolist())


def frame_index(number: int, place: float, *, count: int, available: int) -> int:
    """Index of a frame among `available` >= `count` frames; distinct and rising in `number`."""
    first, last = number * available // count, (number + 1) * available // count - 1
    if place == _MIDDLE:
        return (first + last) // 2
    return first + int(place * (last - first + 1))


def natural_order(names: Sequence[str]) -> list[str]:
    """Names sorted with runs of digits as numbers: frame_9 before frame_10."""
    return sorted(names, key=lambda name: [_number_or_text(run) for run in re.split(r"(\d+)", name)])


def _number_or_text(run: str) -> tuple[int, int, str]:
    return (0, int(run), run) if run.isdecimal() and run.isascii() else (1, 0, run)
