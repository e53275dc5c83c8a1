"""Figures drawn on images: a shape in a color, made of polygons, so that nothing has to be licensed or fetched.

Drawn at four times the size and scaled down, with a white rim and a black line around it, which keeps every color
visible on every background.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from megatron_v2pe.synthesis.split import Split, names_of

GLYPH_COLORS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (30, 80, 220),
    "yellow": (250, 210, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
    "pink": (250, 130, 190),
    "brown": (120, 75, 40),
}
SHAPES = ("star", "heart", "triangle", "square", "diamond", "circle", "cross", "arrow", "moon", "hexagon")
_OVERSAMPLING = 4

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """A figure; its name is how a question speaks of it."""

    color: str
    shape: str

    @property
    def name(self) -> str:
        """`red star`."""
        return f"{self.color} {self.shape}"


def glyphs_of(split: Split) -> list[Glyph]:
    """Combinations that a split may show; the other split never shows them."""
    pairs = names_of(split, list(product(GLYPH_COLORS, SHAPES)), held_out=0.4)
    return [Glyph(color=color, shape=shape) for color, shape in pairs]


def draw_glyph(glyph: Glyph, size: int) -> Image.Image:
    """RGBA image of size x size pixels, transparent around the figure."""
    side = size * _OVERSAMPLING
    canvas = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    brush = ImageDraw.Draw(canvas)
    for scale, color in ((0.48, (0, 0, 0)), (0.455, (255, 255, 255)), (0.41, GLYPH_COLORS[glyph.color])):
        outline = [(side * (0.5 + scale * x), side * (0.5 + scale * y)) for x, y in _outline(glyph.shape)]
        brush.polygon(outline, fill=(*color, 255))
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def glyph_tile(glyph: Glyph, size: int) -> Image.Image:
    """The figure alone on white, as a choice."""
    tile = Image.new("RGB", (size, size), (255, 255, 255))
    figure = draw_glyph(glyph, size * 3 // 4)
    tile.paste(figure, (size // 8, size // 8), figure)
    return tile


def paste_glyphs(
    image: Image.Image, glyph: Glyph, random: np.random.Generator, *, count: int = 1
) -> Image.Image:
    """A copy of an image with the figure on it, `count` times without overlap.

    One figure measures 15 to 30 % of the shorter side, as in MM-NIAH; several share a grid of 3 x 3 fields.
    """
    image = image.copy()
    width, height = image.size
    share = float(random.uniform(0.15, 0.30))
    size = max(4, round(share * min(width, height)))
    for field in random.choice(9, count, replace=False):
        row, column = divmod(int(field), 3)
        left = _within(column, width, size, random)
        top = _within(row, height, size, random)
        figure = draw_glyph(glyph, size)
        image.paste(figure, (left, top), figure)
    return image


def _within(field: int, length: int, size: int, random: np.random.Generator) -> int:
    """A start inside one third of a length, so that a figure stays in its third."""
    third = length / 3
    spare = max(0.0, third - size)
    return min(int(third * field + random.random() * spare), max(0, length - size))


def _outline(shape: str) -> list[Point]:
    """Corners within the unit circle's square."""
    if shape == "circle":
        return _regular(40, 0.0)
    if shape == "heart":
        return _heart()
    if shape == "moon":
        return _moon()
    return _POLYGONS[shape]


def _regular(corners: int, turn: float) -> list[Point]:
    angles = [turn + 2 * math.pi * index / corners for index in range(corners)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def _star() -> list[Point]:
    points = _regular(10, 0.0)
    return [
        (x * (1 if i % 2 == 0 else 0.42), y * (1 if i % 2 == 0 else 0.42)) for i, (x, y) in enumerate(points)
    ]


def _heart() -> list[Point]:
    angles = [2 * math.pi * index / 60 for index in range(60)]
    across = [math.sin(angle) ** 3 for angle in angles]
    along = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(x, -(y + 2.5) / 15) for x, y in zip(across, along, strict=True)]


def _moon() -> list[Point]:
    """A crescent: the outer arc, and an inner arc back."""
    outer = [math.radians(angle) for angle in range(40, 321, 8)]
    inner = [math.radians(angle) for angle in range(300, 59, -8)]
    arc = [(math.cos(angle) + 0.2, math.sin(angle)) for angle in outer]
    return arc + [(0.78 * math.cos(angle) + 0.58, 0.78 * math.sin(angle)) for angle in inner]


_POLYGONS: dict[str, list[Point]] = {
    "star": _star(),
    "triangle": _regular(3, 0.0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)],
    "hexagon": _regular(6, 0.0),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
}  # fmt: skip
