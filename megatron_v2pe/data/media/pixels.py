"""Pixels of a pack: which files are opened for which tiles, and what happens to one that cannot be read.

image references of a pack, tiles [start, stop) of this rank
    still images   one by one, only those with a tile in the range
    frames         one opening for all wanted frames of a draw of a video
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.frames import FrameDraw, VideoRule, VideoSource, frame_index, wanted_frames
from megatron_v2pe.data.media.images import (
    ImageRef,
    UInt8Array,
    check_image,
    cut_tiles,
    empty_tiles,
    load_tiles,
    open_image,
)
from megatron_v2pe.data.media.video import Size, folder_frames, is_frame_folder, probe_video, read_frames

# Index of the image that failed, and why.
OnDamage = Callable[[int, DataError], None]


def measure_video(
    source: VideoSource, *, sample_id: str, rule: VideoRule, max_pixels: int
) -> tuple[Size, ...]:
    """(width, height) of each frame that a sample shows, from headers; the frames of a folder count as equal.

    Raises:
        DataError: missing, not a video, or beyond a limit.
    """
    wanted = wanted_frames(sample_id, rule)
    if _is_folder(source):
        paths = folder_frames(source)
        return (check_image(paths[0], max_pixels=max_pixels),) * min(wanted, len(paths))
    size, count = probe_video(source, wanted=wanted, max_seconds=rule.max_seconds, max_pixels=max_pixels)
    return (size,) * count


def load_tile_range(
    refs: Sequence[ImageRef],
    *,
    image_size: int,
    tile_range: tuple[int, int],
    on_damage: OnDamage | None = None,
) -> UInt8Array:
    """Tiles `tile_range` of a list of images, numbered over the list; other images are not opened.

    Args:
        refs: images and frames in order.
        image_size: tile size S in pixels.
        tile_range: half-open.
        on_damage: told of each image that cannot be read, whose tiles are then black; None raises.

    Returns:
        uint8 [stop - start, 3, S, S].

    Raises:
        DataError: an image cannot be read and `on_damage` is None.
    """
    start, stop = tile_range
    out = empty_tiles(stop - start, image_size)
    base = 0
    frames: dict[FrameDraw, list[tuple[int, int]]] = {}  # draw -> (image, row of its tile)
    for index, ref in enumerate(refs):
        low, high = max(start, base), min(stop, base + ref.grid.num_tiles)
        if low < high and ref.frame is not None:
            frames.setdefault(ref.frame.draw, []).append((index, low - start))
        elif low < high and not ref.path:
            out[low - start : high - start] = 0
        elif low < high:
            own = out[low - start : high - start]
            try:
                load_tiles(ref, image_size=image_size, first=low - base, last=high - base, out=own)
            except DataError as error:
                _blank(own, index, error, on_damage)
        base += ref.grid.num_tiles
    for draw, members in frames.items():
        try:
            _load_frames(draw, [(refs[index], row) for index, row in members], out)
        except DataError as error:
            for index, row in members:
                _blank(out[row], index, error, on_damage)
    return out


def _blank(tiles: UInt8Array, index: int, error: DataError, on_damage: OnDamage | None) -> None:
    if on_damage is None:
        raise error
    tiles[...] = 0
    on_damage(index, error)


def _load_frames(draw: FrameDraw, members: Sequence[tuple[ImageRef, int]], out: UInt8Array) -> None:
    """Frames of one draw into their rows of `out`, one tile each."""
    numbers = [ref.frame.number for ref, _ in members if ref.frame is not None]
    first = members[0][0]
    for (ref, row), image in zip(members, _frame_images(draw, numbers, first), strict=True):
        cut_tiles(image, ref, image_size=out.shape[-1], out=out[row : row + 1])


def _frame_images(draw: FrameDraw, numbers: Sequence[int], ref: ImageRef) -> Iterator[Image.Image]:
    if not _is_folder(draw.source):
        yield from read_frames(draw, numbers, size=ref.size, max_pixels=ref.max_pixels)
        return
    paths, count = folder_frames(draw.source), len(draw.places)
    if len(paths) < count:
        raise DataError(
            f"{draw.source.path}: has {len(paths)} frames, but had at least {count} when lengths were measured; remove "
            "data.cache_dir so that they are measured again"
        )
    for number in numbers:
        path = paths[frame_index(number, draw.places[number], count=count, available=len(paths))]
        with open_image(path, max_pixels=ref.max_pixels) as image:
            yield image.convert("RGB")


def _is_folder(source: VideoSource) -> bool:
    try:
        return is_frame_folder(source)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be looked up ({error.strerror})") from None
