"""Needles that are seen: figures drawn on images of the document, a missing corner, a turned camera.

retrieval   one figure on one image                       choose among 4 pictures of figures
counting    a figure several times on several images      one number for each image
decoys      as retrieval, with other figures elsewhere    choose among 4 names and "none of these"
absent      only other figures                            "none of these"
jigsaw      an image without its lower right corner       choose among 4 corners
multiview   two overlapping views of one image            choose left or right
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.synthesis.material.pictures import ImageStore, Picture, PoolImage, is_lossy, open_rgb
from megatron_v2pe.synthesis.split import Split
from megatron_v2pe.synthesis.tasks.glyphs import Glyph, glyph_tile, glyphs_of, paste_glyphs
from megatron_v2pe.synthesis.tasks.task import Insertion, Task
from megatron_v2pe.synthesis.tasks.words import article

NUM_CHOICES = 4
_DRAWS = 50
_WHICH = "Which of these figures is drawn on one of the images above?"
_GREY = (128, 128, 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class Studio:
    """What pictures are made from and where they go.

    Attributes:
        pool: source images of the split.
        store: where made images are written.
        tile_size: pixels of a tile; a figure shown as a choice is one tile.
        split: whose figures.
    """

    pool: Sequence[PoolImage]
    store: ImageStore
    tile_size: int
    split: Split

    def source(self, random: np.random.Generator) -> PoolImage:
        """A random source image."""
        return self.pool[int(random.integers(len(self.pool)))]

    def with_glyph(self, glyph: Glyph, random: np.random.Generator, *, count: int = 1) -> Picture:
        """A source image with a figure drawn on it."""
        source = self.source(random)
        pasted = paste_glyphs(open_rgb(source), glyph, random, count=count)
        return self.store.draw(pasted, lossy=is_lossy(source))


def _glyphs(studio: Studio, random: np.random.Generator, count: int) -> list[Glyph]:
    own = glyphs_of(studio.split)
    if count > len(own):
        raise DataError(
            f"--decoys: {count} different figures are needed, split {studio.split!r} has {len(own)}; ask for fewer"
        )
    return [own[index] for index in random.choice(len(own), count, replace=False)]


def retrieval(random: np.random.Generator, *, studio: Studio, depth: float) -> Task:
    """One figure among pictures of four."""
    glyphs = _glyphs(studio, random, NUM_CHOICES)
    answer = int(random.integers(NUM_CHOICES))
    picture = studio.with_glyph(glyphs[answer], random)
    tiles = [studio.store.draw(glyph_tile(glyph, studio.tile_size), lossy=False) for glyph in glyphs]
    return Task(
        insertions=(Insertion(depth=depth, pictures=(picture,), count=1),),
        question=_WHICH,
        answer=answer,
        choice_pictures=tuple(tiles),
    )


def decoys(
    random: np.random.Generator, *, studio: Studio, depth: float, num_decoys: int, has_answer: bool
) -> Task:
    """Figures on several images; at most one of them is among the choices."""
    glyphs = _glyphs(studio, random, NUM_CHOICES + num_decoys)
    choices, others = glyphs[:NUM_CHOICES], glyphs[NUM_CHOICES:]
    answer = int(random.integers(NUM_CHOICES)) if has_answer else NUM_CHOICES
    insertions = [
        Insertion(depth=float(place), pictures=(studio.with_glyph(glyph, random),), is_decoy=True, count=1)
        for place, glyph in zip(random.random(num_decoys), others, strict=True)
    ]
    if has_answer:
        picture = studio.with_glyph(choices[answer], random)
        insertions.append(Insertion(depth=depth, pictures=(picture,), count=1))
    return Task(
        insertions=tuple(insertions),
        question=_WHICH,
        answer=answer,
        choices=(*(glyph.name for glyph in choices), "none of these"),
        depth=depth,
    )


def counting(random: np.random.Generator, *, studio: Studio, depths: list[float]) -> Task:
    """One figure, one to three times on an image at each depth."""
    (glyph,) = _glyphs(studio, random, 1)
    counts = [int(count) for count in random.integers(1, 4, len(depths))]
    return Task(
        insertions=tuple(
            Insertion(depth=depth, pictures=(studio.with_glyph(glyph, random, count=count),), count=count)
            for depth, count in zip(depths, counts, strict=True)
        ),
        question=f"How many times is {article(glyph.name)} drawn on each of the images above? Answer with a JSON list "
        "of one number for each image, in order.",
        answer=None,
    )


def jigsaw(random: np.random.Generator, *, studio: Studio, depth: float) -> Task:
    """An image without its lower right quarter, which is among the corners of other images."""
    source = studio.source(random)
    image = open_rgb(source)
    corner = _corner(image)
    others = _different(random, studio, corner)
    answer = int(random.integers(NUM_CHOICES))
    corners = [*others[:answer], corner, *others[answer:]]
    left, top = image.width // 2, image.height // 2
    image.paste(_GREY, (left, top, image.width, image.height))
    lossy = is_lossy(source)
    return Task(
        insertions=(Insertion(depth=depth, pictures=(studio.store.draw(image, lossy=lossy),)),),
        question="One image above has no lower right corner, it is grey there. Which of these pieces completes it?",
        answer=answer,
        choice_pictures=tuple(
            studio.store.draw(_on_tile(choice, studio.tile_size), lossy=lossy) for choice in corners
        ),
    )


def _corner(image: Image.Image) -> Image.Image:
    return image.crop((image.width // 2, image.height // 2, image.width, image.height))


def _on_tile(corner: Image.Image, size: int) -> Image.Image:
    """A corner as large as a square tile allows, on white; tiling by aspect would make a dozen tiles of it."""
    scale = size / max(corner.size)
    fitted = corner.resize((max(1, round(corner.width * scale)), max(1, round(corner.height * scale))))
    tile = Image.new("RGB", (size, size), (255, 255, 255))
    tile.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return tile


def _different(random: np.random.Generator, studio: Studio, corner: Image.Image) -> list[Image.Image]:
    """Corners of other images, as large as this one, no two of them alike."""
    found: list[Image.Image] = []
    seen = {corner.tobytes()}
    for _ in range(_DRAWS):
        other = _corner(open_rgb(studio.source(random))).resize(corner.size)
        if other.tobytes() not in seen:
            seen.add(other.tobytes())
            found.append(other)
        if len(found) == NUM_CHOICES - 1:
            return found
    raise _too_alike("image-jigsaw needs four images whose lower right corners differ", studio)


def multiview(random: np.random.Generator, *, studio: Studio, depth: float) -> Task:
    """Two views of one image, 70 % of its width each, as if the camera had turned."""
    for _ in range(_DRAWS):
        source = studio.source(random)
        image = open_rgb(source)
        width = round(image.width * 0.7)
        views = [image.crop((left, 0, left + width, image.height)) for left in (0, image.width - width)]
        if views[0].tobytes() != views[1].tobytes():
            break
    else:
        raise _too_alike("image-multiview needs an image whose left and right parts differ", studio)
    answer = int(random.integers(2))  # 0: the camera turns left, from the right view to the left one
    lossy = is_lossy(source)
    first, second = (views[1], views[0]) if answer == 0 else (views[0], views[1])
    pictures = (studio.store.draw(first, lossy=lossy), studio.store.draw(second, lossy=lossy))
    return Task(
        insertions=(Insertion(depth=depth, pictures=pictures),),
        question="Two images above follow one another directly and show one scene. Which way did the camera turn?",
        answer=answer,
        choices=("left", "right"),
    )


def _too_alike(rule: str, studio: Studio) -> DataError:
    return DataError(
        f"--images: {rule}, but {_DRAWS} draws from the {len(studio.pool)} images of split {studio.split!r} found "
        "none; give more images"
    )
