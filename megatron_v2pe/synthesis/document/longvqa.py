"""Long-VQA: a short visual question among very many images.

    pages   Image 1: <image>  Image 2: <image> ...            "This is about image 17. What is the total?"
    paste   sheets of numbered pictures, one tile each        "This is about picture 103. ..."

The release's data set has these two forms (folders `image` and `paste`); how its sheets look is not documented, ours
have the cells of one tile grid, so that each picture is seen in about one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.media.tiling import TilingRule, candidate_grids
from megatron_v2pe.synthesis.document.builder import TooShort, Unit
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.material.pictures import ImageStore, Picture, PoolImage, open_rgb
from megatron_v2pe.synthesis.material.vqa import VqaItem
from megatron_v2pe.synthesis.tasks.task import Insertion

_TRIES = 30
_WIDEST = 1.5
"""Widest sheet, as columns over rows; wider ones would be tiled into long strips."""


@dataclass(frozen=True, kw_only=True)
class LongQuestion:
    """A document of images and what is asked about one of them."""

    units: list[Unit]
    question: str
    answer: str


def pages(
    item: VqaItem,
    *,
    others: Sequence[PoolImage],
    depth: float,
    size: int,
    random: np.random.Generator,
    store: ImageStore,
    counter: TokenCounter,
) -> LongQuestion:
    """The item's image among other images, each on a line of its own with its number.

    Args:
        item: the question.
        others: images to choose from.
        depth: 0..1, where the item's image is to be.
        size: most tokens of all images and lines.
        random: source of every choice.
        store: where images are copied.
        counter: counts tokens.

    Raises:
        TooShort: not even the item's image fits.
    """
    line = counter.text("\nImage 8888: ")
    asked = store.copy(item.image)
    room = size - counter.picture(asked) - line
    if room < 0:
        raise TooShort(counter.picture(asked) + line)
    chosen: list[Picture] = []
    misses = 0
    while misses < _TRIES:
        image = others[int(random.integers(len(others)))]
        cost = counter.picture(Picture(name="", size=image.size)) + line
        if cost <= room:
            chosen.append(store.copy(image))
            room -= cost
        else:
            misses += 1
    place = _place_at_depth([counter.picture(picture) + line for picture in chosen], depth)
    ordered = [*chosen[:place], asked, *chosen[place:]]
    units = []
    for number, picture in enumerate(ordered, start=1):
        text = f"\nImage {number}: "
        units.append(
            Unit(
                text=text + IMAGE_PLACEHOLDER,
                tokens=counter.text(text) + counter.picture(picture),
                pictures=(picture,),
                insertion=Insertion(depth=depth, pictures=(picture,), is_decoy=number != place + 1),
            )
        )
    question = f"This is about image {place + 1}. {item.question}"
    return LongQuestion(units=units, question=question, answer=item.answer)


def _place_at_depth(costs: Sequence[int], depth: float) -> int:
    """How many of the other images precede the asked one."""
    ends = np.concatenate([[0], np.cumsum(costs)])
    return int(np.abs(ends - depth * ends[-1]).argmin())


def paste(
    item: VqaItem,
    *,
    others: Sequence[PoolImage],
    depth: float,
    size: int,
    random: np.random.Generator,
    store: ImageStore,
    counter: TokenCounter,
    tiling: TilingRule,
) -> LongQuestion:
    """The item's image among other images on sheets; arguments as for `pages`.

    Args:
        item: the question.
        others: images to choose from.
        depth: 0..1, where the item's image is to be.
        size: most tokens of all sheets.
        random: source of every choice.
        store: where sheets are written.
        counter: counts tokens.
        tiling: decides how many pictures a sheet has.

    Raises:
        TooShort: not even one sheet fits.
    """
    columns, rows = sheet_grid(tiling)
    sheet_size = (columns * tiling.image_size, rows * tiling.image_size)
    text = "\nSheet {}: "
    cost = counter.picture(Picture(name="", size=sheet_size)) + counter.text(text.format(888))
    num_sheets = size // cost
    if num_sheets < 1:
        raise TooShort(cost)
    num_pictures = num_sheets * columns * rows
    place = min(int(depth * num_pictures), num_pictures - 1)
    sources = [others[index] for index in random.integers(len(others), size=num_pictures)]
    sources[place] = item.image
    units = []
    for sheet in range(num_sheets):
        first = sheet * columns * rows
        drawn = _draw_sheet(
            sources[first : first + columns * rows], first + 1, columns, tiling.image_size, sheet_size
        )
        picture = store.draw(drawn, lossy=True)
        lead = text.format(sheet + 1)
        is_asked = first <= place < first + columns * rows
        units.append(
            Unit(
                text=lead + IMAGE_PLACEHOLDER,
                tokens=counter.text(lead) + counter.picture(picture),
                pictures=(picture,),
                insertion=Insertion(depth=depth, pictures=(picture,), is_decoy=not is_asked),
            )
        )
    question = f"This is about picture {place + 1}; each picture has its number in a corner. {item.question}"
    return LongQuestion(units=units, question=question, answer=item.answer)


def sheet_grid(tiling: TilingRule) -> tuple[int, int]:
    """Columns and rows of a sheet: the largest grid of tiles that is nearly square, at least 2 x 2."""
    most = tiling.max_tiles if tiling.dynamic else 1
    grids = [(columns, rows) for columns, rows in candidate_grids(1, most) if 1 <= columns / rows <= _WIDEST]
    return max([(2, 2), *grids], key=lambda grid: grid[0] * grid[1])


def _draw_sheet(
    sources: Sequence[PoolImage], first_number: int, columns: int, cell: int, size: tuple[int, int]
) -> Image.Image:
    """Pictures scaled into cells, each with its number on white in its upper left corner."""
    sheet = Image.new("RGB", size, (255, 255, 255))
    brush = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(8, cell // 12))
    margin = max(1, cell // 64)
    for index, source in enumerate(sources):
        row, column = divmod(index, columns)
        picture = open_rgb(source)
        scale = (cell - 2 * margin) / max(picture.size)
        inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        left, top = column * cell + margin, row * cell + margin
        sheet.paste(picture.resize(inner, Image.Resampling.BICUBIC), (left, top))
        label = str(first_number + index)
        box = brush.textbbox((left + 1, top + 1), label, font=font)
        brush.rectangle((left, top, box[2] + 1, box[3] + 1), fill=(255, 255, 255))
        brush.text((left + 1, top + 1), label, fill=(0, 0, 0), font=font)
    return sheet
