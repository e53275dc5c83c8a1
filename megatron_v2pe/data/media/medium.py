"""What every medium of a record answers, and the tiles of a pack.

    probe       (width, height) of each image that it shows, from headers     once, for the index
    tiles       how these images are cut, from their sizes alone              for the index and in every draw
    open_range  pixels of some of the tiles                                   in a loader worker, its own tiles only

A record lists media. A picture file shows one image, a video its frames. A new kind of medium is a module with such a
class; `samples.records` then has to recognise it in an annotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import CutRule, ImageTiles, Size, UInt8Array, empty_tiles
from megatron_v2pe.data.media.frames import DEFAULT_RULE, VideoRule
from megatron_v2pe.v2pe.strides import sample_generator

IMAGE_PLACEHOLDER = "<image>"
# Inside a placeholder that is meant as text; a code point that Unicode keeps out of texts.
LITERAL_MARK = "\ufdd0"
# Number of the medium that failed, and why.
OnDamage = Callable[[int, DataError], None]


def plain_text(text: str) -> str:
    """A text as it was meant, without the marks of literal placeholders."""
    return text.replace(LITERAL_MARK, "") if LITERAL_MARK in text else text


@dataclass(frozen=True, kw_only=True)
class MediaRules:
    """How the media of a run are read.

    Attributes:
        max_pixels: largest width x height that is decoded.
        exif: `apply` turns a picture as its EXIF orientation says; `ignore` takes the stored pixels, as the release.
        alpha: `white` lays transparent pictures on white; `black` drops the transparency, as the release, which shows
            the colors stored below it, mostly black.
        video: how videos are sampled.
    """

    max_pixels: int = 89_478_485
    exif: Literal["ignore", "apply"] = "ignore"
    alpha: Literal["black", "white"] = "black"
    video: VideoRule = DEFAULT_RULE


@dataclass(frozen=True, kw_only=True)
class ImageHeader:
    """What the header of an image says.

    Attributes:
        size: (width, height) as the model sees it.
        traits: what reading it by the rules of the run loses or leaves, see `media.traits`.
    """

    size: Size
    traits: tuple[str, ...] = ()


HeaderOf = Callable[[str, MediaRules], ImageHeader]


@dataclass(frozen=True, kw_only=True)
class DrawSeed:
    """What the random choices of one draw of a sample depend on.

    Attributes:
        seed: of the run.
        epoch: number of the epoch, unique over the run.
        identity: name of the draw within its epoch.
    """

    seed: int = 0
    epoch: int = 0
    identity: str = ""

    def generator(self, purpose: str = "") -> np.random.Generator:
        """Random numbers of their own for each purpose."""
        return sample_generator(
            self.seed, self.epoch, f"{self.identity}/{purpose}" if purpose else self.identity
        )


class Medium(Protocol):
    """A file of a record that shows images.

    Attributes:
        placeholder: marks its place in the conversation.
        num_images: how many images it shows, where its kind decides it; None where `probe` does.
        way_to_shorten: what makes a sample of it shorter, where its images cannot be distributed over several
            samples; empty where they can.
    """

    placeholder: ClassVar[str]
    num_images: ClassVar[int | None]
    way_to_shorten: ClassVar[str]

    @property
    def path(self) -> str:
        """The file, for messages."""

    def text(self, num_images: int) -> str:
        """What replaces its placeholder: one `<image>` for each image."""

    def probe(self, rules: MediaRules, *, sample_id: str, header_of: HeaderOf) -> tuple[ImageHeader, ...]:
        """Header of each image that it shows in a sample; nothing is decoded that a header can say.

        Raises:
            DataError: missing, damaged, or beyond a limit.
        """

    def tiles(self, sizes: Sequence[Size], rule: CutRule) -> tuple[ImageTiles, ...]:
        """How its images are cut."""

    def open_range(self, own: MediumTiles, first: int, last: int, out: Sequence[UInt8Array]) -> None:
        """Decode what is needed for some of its tiles.

        Args:
            own: as `tiles` planned them, with the run's rules and the seed of the draw.
            first: first tile, counted over all its images.
            last: one past the last tile.
            out: uint8 [last - first, 3, S, S] for every size of tiles, filled.

        Raises:
            DataError: see `probe`; also a file that changed since it was probed.
        """


@dataclass(frozen=True, kw_only=True)
class MediumTiles:
    """A medium in one draw of a sample: how its images are cut; no pixels.

    Attributes:
        medium: the file; None is one that is not known any more, whose tiles are black.
        images: its images in order.
        rules: of the run.
        seed: of the draw.
    """

    medium: Medium | None
    images: tuple[ImageTiles, ...]
    rules: MediaRules = field(default_factory=MediaRules)
    seed: DrawSeed = field(default_factory=DrawSeed)

    @property
    def num_tiles(self) -> int:
        """Tiles of all its images."""
        return sum(image.grid.num_tiles for image in self.images)

    def open_range(self, first: int, last: int, out: Sequence[UInt8Array]) -> None:
        """Pixels of tiles first..last-1, written to `out`; see `Medium.open_range`."""
        if self.medium is None:
            for tiles in out:
                tiles[...] = 0
        else:
            self.medium.open_range(self, first, last, out)


def load_tile_range(
    media: Sequence[MediumTiles],
    *,
    image_size: int,
    smaller_sizes: tuple[int, ...] = (),
    tile_range: tuple[int, int],
    on_damage: OnDamage | None = None,
) -> UInt8Array:
    """Tiles `tile_range` of a list of media, numbered over the list; other media are not opened.

    Args:
        media: in order.
        image_size: tile size S in pixels.
        smaller_sizes: pixels of a tile's side in the smaller branches of a pyramid.
        tile_range: half-open.
        on_damage: called for each medium that cannot be read, whose tiles are then black; None raises.

    Returns:
        uint8 [stop - start, 3, S, S]; with several sizes uint8 [stop - start, sum of 3 S S], see `split_rows`.

    Raises:
        DataError: a medium cannot be read and `on_damage` is None.
    """
    start, stop = tile_range
    out, views = empty_tiles(stop - start, (image_size, *smaller_sizes))
    base = 0
    for number, each in enumerate(media):
        end = base + each.num_tiles
        low, high = max(start, base), min(stop, end)
        if low < high:
            own = [view[low - start : high - start] for view in views]
            try:
                each.open_range(low - base, high - base, own)
            except DataError as error:
                if on_damage is None:
                    raise
                for tiles in own:
                    tiles[...] = 0
                on_damage(number, error)
        base = end
    return out
