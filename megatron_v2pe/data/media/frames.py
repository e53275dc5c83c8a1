"""Which frames of a video a sample shows: one from each of `count` equal intervals.

    vlen 10, count 4   intervals [0,2) [2,5) [5,7) [7,10)   rand: one frame of each, anew in every draw
                                                            middle: 0 3 5 8

The count is drawn once for a sample, from its identity alone, because a plan needs lengths that stay; which frame
stands for its interval is drawn in each epoch. Videos are opened by `video.py`, and only where pixels are due.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.v2pe.strides import sample_generator

FrameSampling = Literal["rand", "middle"]
_MIDDLE = -1.0  # place of the middle frame, which is not a fraction of the interval: [0, 2) has 0


@dataclass(frozen=True, kw_only=True)
class VideoRule:
    """How videos of a run are sampled.

    Attributes:
        min_frames: fewest frames, fewer only where a video has fewer.
        max_frames: most frames.
        sampling: `rand` or `middle`.
        max_seconds: longest stretch of video that is gone through.
    """

    min_frames: int
    max_frames: int
    sampling: FrameSampling
    max_seconds: float

    def of(self, source: VideoSource) -> VideoRule:
        """The rule with a data set's own numbers of frames.

        Raises:
            DataError: the two together are no range.
        """
        least, most = source.min_frames or self.min_frames, source.max_frames or self.max_frames
        if least > most:
            raise DataError(
                f"{source.path}: min_num_frame is {least}, but max_num_frame is {most}; data.min_num_frame and "
                "data.max_num_frame count where the data set gives none"
            )
        return replace(self, min_frames=least, max_frames=most)


@dataclass(frozen=True, kw_only=True)
class VideoSource:
    """A video as a record names it, with what its data set says of all its videos.

    Attributes:
        path: file, or folder of frames.
        clip: (start, end) in seconds; None is the whole video.
        fps: frames per second of a folder of frames; None is unknown. Files know their own times.
        min_frames: fewest frames of the data set; None takes the run's.
        max_frames: most frames of the data set; None takes the run's.
    """

    path: str
    clip: tuple[float, float] | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None


DEFAULT_RULE = VideoRule(min_frames=4, max_frames=20, sampling="rand", max_seconds=7200.0)


@dataclass(frozen=True, kw_only=True)
class FrameDraw:
    """The frames of one draw of a sample.

    Attributes:
        source: the video.
        max_seconds: see `VideoRule`.
        places: for each interval, where in it the frame lies: a fraction in [0, 1), or the middle.
    """

    source: VideoSource
    max_seconds: float
    places: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FrameRef:
    """One frame: number `number` of a draw."""

    draw: FrameDraw
    number: int


def wanted_frames(sample_id: str, rule: VideoRule) -> int:
    """How many frames a sample wants: uniform in min_frames..max_frames, the same in every run."""
    generator = sample_generator(0, 0, f"{sample_id}/frames")
    return int(generator.integers(rule.min_frames, rule.max_frames + 1))


def draw_places(rule: VideoRule, count: int, *, seed: int, epoch: int, identity: str) -> tuple[float, ...]:
    """Where in its interval each of `count` frames lies, for one draw."""
    if rule.sampling == "middle":
        return (_MIDDLE,) * count
    return tuple(sample_generator(seed, epoch, f"{identity}/frames").random(count).tolist())


def frame_index(number: int, place: float, *, count: int, available: int) -> int:
    """Index of a frame among `available` >= `count` frames; distinct and rising in `number`."""
    first, last = number * available // count, (number + 1) * available // count - 1
    if place == _MIDDLE:
        return (first + last) // 2
    return first + int(place * (last - first + 1))


def natural_order(names: Sequence[str]) -> list[str]:
    """Names sorted with runs of digits as numbers: frame_9 before frame_10."""
    return sorted(names, key=lambda name: [_number_or_text(part) for part in re.split(r"(\d+)", name)])


def _number_or_text(part: str) -> tuple[int, int, str]:
    return (0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part)


def frame_lines(count: int) -> str:
    """What stands for a video in the conversation: one line with a placeholder for each frame."""
    return "".join(f"Frame{number}: <image>\n" for number in range(1, count + 1))
