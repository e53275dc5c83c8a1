"""Videos: a file that PyAV reads, or a folder of frames. Each frame that a sample shows is one tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import CutRule, ImageTiles, Size, UInt8Array, cut_tiles, plan_tiles
from megatron_v2pe.data.media.frames import (
    VideoRule,
    draw_places,
    frame_index,
    natural_order,
    wanted_frames,
)
from megatron_v2pe.data.media.image import read_rgb
from megatron_v2pe.data.media.medium import (
    IMAGE_PLACEHOLDER,
    HeaderOf,
    ImageHeader,
    MediaRules,
    MediumTiles,
)
from megatron_v2pe.data.media.video_stream import probe_video, read_frames
from megatron_v2pe.data.sources import storage

VIDEO_PLACEHOLDER = "<video>"
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video as a record names it, with the settings of its data set; a `medium.Medium`.

    Attributes:
        path: file, or folder of frames.
        clip: (start, end) in seconds; None is the whole video.
        fps: frames per second of a folder of frames; None is unknown. Files know their own times.
        min_frames: fewest frames of the data set; None uses the run's.
        max_frames: most frames of the data set; None uses the run's.
    """

    path: str
    clip: tuple[float, float] | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    placeholder: ClassVar[str] = VIDEO_PLACEHOLDER
    num_images: ClassVar[int | None] = None
    way_to_shorten: ClassVar[str] = "lower data.max_num_frame (a video is not split)"

    def text(self, num_images: int) -> str:
        """One line with a placeholder for each frame.

        The lines are those of the release's evaluation, `Frame1: <image>` and a line break each; its training code
        wrote `Frame1:<image>` and no break before the question.
        """
        return "".join(f"Frame{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, num_images + 1))

    def probe(self, rules: MediaRules, *, sample_id: str, header_of: HeaderOf) -> tuple[ImageHeader, ...]:
        """Header of each frame that a sample shows; the frames of a folder count as equal.

        Raises:
            DataError: missing, not a video, or beyond a limit.
        """
        rule = self._rule(rules)
        wanted = wanted_frames(sample_id, rule)
        if self._is_folder():
            paths = self._frame_paths()
            return (header_of(paths[0], rules),) * min(wanted, len(paths))
        size, count = probe_video(
            self.path,
            clip=self.clip,
            wanted=wanted,
            max_seconds=rule.max_seconds,
            max_pixels=rules.max_pixels,
        )
        return (ImageHeader(size=size),) * count

    def tiles(self, sizes: Sequence[Size], rule: CutRule) -> tuple[ImageTiles, ...]:
        """One tile for each frame."""
        return plan_tiles(sizes, replace(rule, tiling=replace(rule.tiling, dynamic=False)))

    def open_range(self, own: MediumTiles, first: int, last: int, out: Sequence[UInt8Array]) -> None:
        """Decode the frames of a range, which the draw chooses; the file is opened once.

        Raises:
            DataError: see `probe`; also a video that changed since it was probed.
        """
        rule, max_pixels = self._rule(own.rules), own.rules.max_pixels
        places = draw_places(rule, len(own.images), own.seed.generator("frames"))
        numbers = range(first, last)
        if self._is_folder():
            frames = self._folder_frames(numbers, places, rules=own.rules)
        else:
            frames = read_frames(
                self.path,
                numbers,
                places=places,
                clip=self.clip,
                size=own.images[0].size,
                max_seconds=rule.max_seconds,
                max_pixels=max_pixels,
            )
        for row, (number, frame) in enumerate(zip(numbers, frames, strict=True)):
            cut_tiles(frame, own.images[number], 0, 1, out=[tiles[row : row + 1] for tiles in out])

    def _rule(self, rules: MediaRules) -> VideoRule:
        """The run's rule with the data set's own numbers of frames.

        Raises:
            DataError: the two together are no range.
        """
        least = self.min_frames or rules.video.min_frames
        most = self.max_frames or rules.video.max_frames
        if least > most:
            raise DataError(
                f"{self.path}: min_num_frame is {least}, but max_num_frame is {most}; data.min_num_frame and "
                "data.max_num_frame count where the data set gives none"
            )
        return replace(rules.video, min_frames=least, max_frames=most)

    def _is_folder(self) -> bool:
        try:
            return self.path.endswith("/") or storage.is_folder(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be looked up ({error.strerror})") from None

    def _folder_frames(
        self, numbers: Sequence[int], places: Sequence[float], *, rules: MediaRules
    ) -> Iterator[Image.Image]:
        """RGB images of some frames of a draw of a folder."""
        paths, count = self._frame_paths(), len(places)
        if len(paths) < count:
            raise DataError(
                f"{self.path}: has {len(paths)} frames, but had at least {count} when lengths were measured; remove "
                "data.cache_dir so that they are measured again"
            )
        for number in numbers:
            path = paths[frame_index(number, places[number], count=count, available=len(paths))]
            yield read_rgb(path, rules)

    def _frame_paths(self) -> list[str]:
        """Frames of a folder, in natural order, cut to the clip.

        Raises:
            DataError: no such folder, no frame in it, or a clip without a known frame rate.
        """
        folder = self.path.rstrip("/")
        try:
            names = [name for name in storage.list_files(folder) if name.lower().endswith(FRAME_SUFFIXES)]
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed as a folder of frames ({error.strerror})") from None
        names = natural_order(names)
        if self.clip is not None:
            if self.fps is None:
                raise DataError(
                    f"{folder}: a clip of a folder of frames needs its frames per second; set video_fps of the data set"
                )
            start, end = (round(second * self.fps) for second in self.clip)
            names = names[start:end]
        if not names:
            raise DataError(
                f"{folder}: no frame ({', '.join(FRAME_SUFFIXES)}) in the folder, or none in the clip"
            )
        return [f"{folder}/{name}" for name in names]
