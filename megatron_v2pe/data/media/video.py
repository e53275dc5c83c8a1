"""Frames of video files through PyAV: found by packet times, decoded from the nearest key frame.

    open -> header: size, duration, frames -> packets: time of every frame (nothing decoded) -> seek, decode, RGB

Times are exact because they come from the packets, also where the frame rate varies. Files are handed to FFmpeg as
open streams and it may open nothing else: a playlist cannot reach out of the data set. Every failure names the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.media.frames import FrameDraw, VideoSource, frame_index, natural_order
from megatron_v2pe.data.sources import storage

Size = tuple[int, int]
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MAX_FRAMES = 4_000_000  # of one file; more than a day at 30 frames per second
_BUFFER_BYTES = 2**18
# A header's frame count is an estimate. Where it is this many times what is wanted, an error in it does not matter.
_SAFE_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class _Timeline:
    """Times of the frames that may be shown, rising, and of all key frames, in units of the stream.

    Attributes:
        times: presentation times; their number alone counts where `is_timed` is false.
        key_times: presentation times of key frames.
        is_timed: every frame has a time of its own; else frames are counted from the start of the file.
        first: frames of the file before the first one that may be shown.
    """

    times: list[int]
    key_times: list[int]
    is_timed: bool
    first: int


def is_frame_folder(source: VideoSource) -> bool:
    """Whether a video is a folder of frames.

    Raises:
        OSError: a remote store cannot be asked.
    """
    return source.path.endswith("/") or storage.is_folder(source.path)


def folder_frames(source: VideoSource) -> list[str]:
    """Paths of the frames of a folder, in natural order, cut to the clip.

    Raises:
        DataError: no such folder, no frame in it, or a clip without a known frame rate.
    """
    folder = source.path.rstrip("/")
    try:
        names = [name for name in storage.list_files(folder) if name.lower().endswith(FRAME_SUFFIXES)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed as a folder of frames ({error.strerror})") from None
    names = natural_order(names)
    if source.clip is not None:
        if source.fps is None:
            raise DataError(
                f"{folder}: a clip of a folder of frames needs its frames per second; set video_fps of the data set"
            )
        start, end = (round(second * source.fps) for second in source.clip)
        names = names[start:end]
    if not names:
        raise DataError(
            f"{folder}: no frame ({', '.join(FRAME_SUFFIXES)}) in the folder, or none in the clip"
        )
    return [f"{folder}/{name}" for name in names]


def probe_video(source: VideoSource, *, wanted: int, max_seconds: float, max_pixels: int) -> tuple[Size, int]:
    """(width, height) and how many of the `wanted` frames a video file has, without decoding any.

    Raises:
        DataError: missing, not a video, longer than `max_seconds` or larger than `max_pixels`, or an empty clip.
        ConfigError: PyAV is not installed.
    """
    with _opened(source, max_pixels) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        expected = _expected_frames(container, stream, source, max_seconds)
        if expected is None or expected < _SAFE_FACTOR * wanted:
            expected = len(_timeline(container, stream, source, max_seconds).times)
        return size, min(wanted, expected)


def read_frames(
    draw: FrameDraw, numbers: Sequence[int], *, size: Size, max_pixels: int
) -> Iterator[Image.Image]:
    """RGB images of some frames of a draw.

    Args:
        draw: see `frames.FrameDraw`.
        numbers: which of its frames, rising.
        size: (width, height) that the file had when it was measured.
        max_pixels: largest width x height that is decoded.

    Raises:
        DataError: see `probe_video`; also a file that changed or whose frames cannot be decoded.
    """
    source, count = draw.source, len(draw.places)
    with _opened(source, max_pixels) as (container, stream):
        found = (stream.codec_context.width, stream.codec_context.height)
        timeline = _timeline(container, stream, source, draw.max_seconds)
        if found != size or len(timeline.times) < count:
            raise DataError(
                f"{source.path}: has {len(timeline.times)} frames of {found[0]} x {found[1]}, but had at least {count} "
                f"of {size[0]} x {size[1]} when lengths were measured; remove data.cache_dir so that they are measured "
                "again"
            )
        available = len(timeline.times)
        picked = [frame_index(n, draw.places[n], count=count, available=available) for n in numbers]
        decode = _decode_at_times if timeline.is_timed else _decode_in_order
        for frame in decode(container, stream, timeline, picked):
            yield frame.to_image()


@contextmanager
def _opened(source: VideoSource, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, checked; failures of FFmpeg become a DataError."""
    av = _pyav(source.path)
    try:
        with (
            storage.open_binary(source.path) as file,
            av.open(
                file,
                options={"protocol_whitelist": "none"},
                buffer_size=_BUFFER_BYTES,
                metadata_errors="ignore",
            ) as container,
        ):
            if not container.streams.video:
                raise DataError(f"{source.path}: holds no video stream; repair or remove the sample")
            stream = container.streams.video[0]
            _bound(source, stream, max_pixels)
            yield container, stream
    except FileNotFoundError:
        raise DataError(
            f"{source.path}: no such video; check the data set's root and the annotation"
        ) from None
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{source.path}: cannot be read as a video ({error}); repair or remove the sample"
        ) from error


def _pyav(path: str) -> Any:
    try:
        import av
        import av.error
    except ImportError:
        raise ConfigError(
            f"{path}: videos need the package av (PyAV), which is not installed; run  "
            "pip install 'megatron_v2pe[video]'"
        ) from None
    return av


def _bound(source: VideoSource, stream: Any, max_pixels: int) -> None:
    """Refuse huge frames, also those that a later packet announces; one thread, as a loader has many workers."""
    context = stream.codec_context
    if context is None or not context.width or not context.height:
        raise DataError(f"{source.path}: its video has no known size or codec; convert the file")
    if context.width * context.height > max_pixels:
        raise DataError(
            f"{source.path}: {context.width} x {context.height} = {context.width * context.height} pixels exceed "
            f"data.max_image_pixels = {max_pixels}; scale the video down or raise the limit"
        )
    context.thread_count = 1
    context.options = {**context.options, "max_pixels": str(max_pixels)}


def _expected_frames(container: Any, stream: Any, source: VideoSource, max_seconds: float) -> int | None:
    """Frames of the clip by the header; None where the header does not tell."""
    seconds = None
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / 1e6
    start, end = source.clip or (0.0, seconds if seconds is not None else 0.0)
    if end - start > max_seconds:
        _refuse_length(source, end - start, max_seconds)
    if seconds is None or not stream.average_rate:
        return None
    by_rate = int(max(0.0, min(end, seconds) - start) * float(stream.average_rate))
    return by_rate if source.clip is not None else (min(stream.frames, by_rate) or None)


def _refuse_length(source: VideoSource, seconds: float, max_seconds: float) -> None:
    raise DataError(
        f"{source.path}: {seconds:.0f} seconds exceed data.max_video_seconds = {max_seconds:g}; give the record a "
        "shorter clip or raise the limit"
    )


def _timeline(container: Any, stream: Any, source: VideoSource, max_seconds: float) -> _Timeline:
    """Go through the packets; nothing is decoded."""
    packets: list[tuple[int | None, bool]] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, bool(packet.is_keyframe)))
        if len(packets) > _MAX_FRAMES:
            raise DataError(f"{source.path}: more than {_MAX_FRAMES} frames; cut the video")
    times = sorted(pts for pts, _ in packets if pts is not None)
    is_timed = len(set(times)) == len(packets)
    second = 1 / float(stream.time_base) if stream.time_base else 1.0
    if not is_timed:  # AVI and raw streams: frames have a rate only
        second = float(stream.average_rate or 25)
        times = list(range(len(packets)))
    origin = times[0] if times else 0
    start, end = source.clip or (0.0, float("inf"))
    inside = [time for time in times if start <= (time - origin) / second < end]
    if not inside:
        what = "no frame" if source.clip is None else f"no frame in the clip {list(source.clip)}"
        raise DataError(f"{source.path}: {what}; repair or remove the sample")
    if (inside[-1] - inside[0]) / second > max_seconds:
        _refuse_length(source, (inside[-1] - inside[0]) / second, max_seconds)
    keys = sorted(pts for pts, is_key in packets if is_key and pts is not None)
    return _Timeline(
        times=inside, key_times=keys, is_timed=is_timed, first=bisect_right(times, inside[0]) - 1
    )


def _decode_at_times(
    container: Any, stream: Any, timeline: _Timeline, picked: Sequence[int]
) -> Iterator[Any]:
    """Frames at the picked places of the timeline; seeks where a key frame lies between two of them."""
    frames, position = None, None
    for target in (timeline.times[index] for index in picked):
        key = bisect_right(timeline.key_times, target) - 1
        key_time = timeline.key_times[key] if key >= 0 else timeline.times[0]
        if frames is None or position is None or key_time > position:
            container.seek(key_time, stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            position = frame.pts
            if position is not None and position >= target:
                break
        if position != target:
            raise ValueError(f"the frame at {float(target * stream.time_base):.3f} s cannot be decoded")
        yield frame


def _decode_in_order(
    container: Any, stream: Any, timeline: _Timeline, picked: Sequence[int]
) -> Iterator[Any]:
    """Frames by their number from the start of the file."""
    container.seek(0)
    wanted = [timeline.first + index for index in picked]
    for number, frame in enumerate(container.decode(stream)):
        if number == wanted[0]:
            yield frame
            wanted = wanted[1:]
            if not wanted:
                return
    raise ValueError(f"frame {wanted[0]} cannot be decoded")
