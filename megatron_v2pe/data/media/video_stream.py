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

from megatron_v2pe.core.errors import ConfigError, DataError, V2PEError
from megatron_v2pe.data.media.cut import Size
from megatron_v2pe.data.media.frames import frame_index
from megatron_v2pe.data.sources import storage
from megatron_v2pe.data.sources.file_kinds import kind_of

Clip = tuple[float, float] | None
_MAX_FRAMES = 4_000_000  # of one file; more than a day at 30 frames per second
_BUFFER_BYTES = 2**18
_HEAD_BYTES = 2**12
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


def probe_video(
    path: str, *, clip: Clip, wanted: int, max_seconds: float, max_pixels: int
) -> tuple[Size, int]:
    """(width, height) and how many of the `wanted` frames a video file has, without decoding any.

    Args:
        path: file or address.
        clip: (start, end) in seconds; None is the whole video.
        wanted: frames that are wanted.
        max_seconds: longest clip or video.
        max_pixels: largest width x height.

    Raises:
        DataError: missing, not a video, longer than `max_seconds` or larger than `max_pixels`, or an empty clip.
        ConfigError: PyAV is not installed.
    """
    with _opened(path, max_pixels) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        expected = _expected_frames(container, stream, path, clip, max_seconds)
        if expected is None or expected < _SAFE_FACTOR * wanted:
            expected = len(_timeline(container, stream, path, clip, max_seconds).times)
        return size, min(wanted, expected)


def read_frames(
    path: str,
    numbers: Sequence[int],
    *,
    places: Sequence[float],
    clip: Clip,
    size: Size,
    max_seconds: float,
    max_pixels: int,
) -> Iterator[Image.Image]:
    """RGB images of some frames of a draw.

    Args:
        path: file or address.
        numbers: which of the drawn frames, rising.
        places: where in its interval each drawn frame lies, see `frames.draw_places`.
        clip: (start, end) in seconds; None is the whole video.
        size: (width, height) that the file had when it was probed.
        max_seconds: longest clip or video.
        max_pixels: largest width x height that is decoded.

    Raises:
        DataError: see `probe_video`; also a file that changed or whose frames cannot be decoded.
    """
    count = len(places)
    with _opened(path, max_pixels) as (container, stream):
        found = (stream.codec_context.width, stream.codec_context.height)
        timeline = _timeline(container, stream, path, clip, max_seconds)
        available = len(timeline.times)
        if found != size or available < count:
            raise DataError(
                f"{path}: has {available} frames of {found[0]} x {found[1]}, but had at least {count} of "
                f"{size[0]} x {size[1]} when lengths were measured; remove data.cache_dir so that they are measured "
                "again"
            )
        picked = [frame_index(n, places[n], count=count, available=available) for n in numbers]
        decode = _decode_at_times if timeline.is_timed else _decode_in_order
        for frame in decode(container, stream, timeline, picked):
            yield frame.to_image()


@contextmanager
def _opened(path: str, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, checked; failures of FFmpeg become a DataError."""
    av = _pyav(path)
    try:
        with (
            storage.open_binary(path) as file,
            av.open(
                file,
                options={"protocol_whitelist": "none"},
                buffer_size=_BUFFER_BYTES,
                **_metadata_options(av),
            ) as container,
        ):
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise DataError(f"{path}: is a single picture, not a video; name it as 'image' of the record")
            if not container.streams.video:
                raise DataError(f"{path}: holds no video stream; repair or remove the sample")
            stream = container.streams.video[0]
            _bound(path, stream, max_pixels)
            yield container, stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such video; check the data set's root and the annotation") from None
    except V2PEError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory to read the video; scale it down or cut it") from error
    except Exception as error:  # FFmpeg's errors, and what decoders and containers raise beside them
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DataError:
    """What the file is if it is no video; else what FFmpeg says, on one line."""
    try:
        with storage.open_binary(path) as file:
            kind = kind_of(file.read(_HEAD_BYTES))
    except OSError:
        kind = ""
    if kind and not kind.endswith("video"):
        return DataError(f"{path}: cannot be read as a video: it is {kind}; give a video file")
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"{path}: cannot be read as a video ({text}); repair or remove the sample")


def _metadata_options(av: Any) -> dict[str, str]:
    """Titles that are no UTF-8 are no error; PyAV 19 keeps such bytes by itself and has no option for it."""
    return {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}


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


def _bound(path: str, stream: Any, max_pixels: int) -> None:
    """Refuse huge frames, also those that a later packet announces; one thread, as a loader has many workers."""
    context = stream.codec_context
    if context is None or not context.width or not context.height:
        raise DataError(f"{path}: its video has no known size or codec; convert the file")
    if context.width * context.height > max_pixels:
        raise DataError(
            f"{path}: {context.width} x {context.height} = {context.width * context.height} pixels exceed "
            f"data.max_image_pixels = {max_pixels}; scale the video down or raise the limit"
        )
    context.thread_count = 1
    context.options = {**context.options, "max_pixels": str(max_pixels)}


def _expected_frames(container: Any, stream: Any, path: str, clip: Clip, max_seconds: float) -> int | None:
    """Frames of the clip by the header; None where the header does not say."""
    seconds = None
    if stream.duration is not None and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        seconds = container.duration / 1e6
    start, end = clip or (0.0, seconds if seconds is not None else 0.0)
    if end - start > max_seconds:
        _refuse_length(path, end - start, max_seconds)
    if seconds is None or not stream.average_rate:
        return None
    by_rate = int(max(0.0, min(end, seconds) - start) * float(stream.average_rate))
    return by_rate if clip is not None else (min(stream.frames, by_rate) or None)


def _refuse_length(path: str, seconds: float, max_seconds: float) -> None:
    raise DataError(
        f"{path}: {seconds:.0f} seconds exceed data.max_video_seconds = {max_seconds:g}; give the record a "
        "shorter clip or raise the limit"
    )


def _timeline(container: Any, stream: Any, path: str, clip: Clip, max_seconds: float) -> _Timeline:
    """Read the times of all packets; nothing is decoded."""
    packets: list[tuple[int | None, bool]] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, bool(packet.is_keyframe)))
        if len(packets) > _MAX_FRAMES:
            raise DataError(f"{path}: more than {_MAX_FRAMES} frames; cut the video")
    times = sorted(pts for pts, _ in packets if pts is not None)
    is_timed = len(set(times)) == len(packets)
    second = 1 / float(stream.time_base) if stream.time_base else 1.0
    if not is_timed:  # AVI and raw streams: frames have a rate only
        second = float(stream.average_rate or 25)
        times = list(range(len(packets)))
    origin = times[0] if times else 0
    start, end = clip or (0.0, float("inf"))
    inside = [time for time in times if start <= (time - origin) / second < end]
    if not inside:
        what = "no frame" if clip is None else f"no frame in the clip {list(clip)}"
        raise DataError(f"{path}: {what}; repair or remove the sample")
    if (inside[-1] - inside[0]) / second > max_seconds:
        _refuse_length(path, (inside[-1] - inside[0]) / second, max_seconds)
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
