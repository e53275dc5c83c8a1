"""Letters of every script are drawn where a font has them, and said where none has; tiles lie as they were cut."""

import numpy as np
import pytest

from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.inspection import letters
from megatron_v2pe.inspection.sample_picture import _drawable, _undrawn, tile_sheet
from megatron_v2pe.inspection.sample_view import DocumentView, PackView, TokenRun

pytest.importorskip("matplotlib")


def run(text):
    return TokenRun(kind="text", start=0, end=1, first_position=0, last_position=0, owners=(0,), text=text)


def view(text):
    document = DocumentView(
        sample_id="a:1", runs=(run(text),), media=(), num_tiles=(), strides=(), num_supervised=0
    )
    return PackView(
        title="", documents=(document,), batch=None, positions=np.zeros(1), owners=np.zeros(1, dtype=np.int64), cp=1,
        tokens_per_tile=16, image_size=112,
    )  # fmt: skip


def test_matplotlibs_own_font_has_more_than_latin():
    assert _drawable(run("a b\n\u03b1\u0416\u2192")) == "a b\n\u03b1\u0416\u2192"
    assert _undrawn(view("a \u03b1")) == ""


def test_letters_without_a_font_are_said(monkeypatch):
    monkeypatch.setattr(
        "megatron_v2pe.inspection.sample_picture.font_of",
        lambda letter: None if ord(letter) > 0x3000 else "x",
    )
    assert _drawable(run("a\u732b")) == "a\u00b7"
    assert "2 letters are drawn as \u00b7, because no installed font has them" in _undrawn(
        view("a\u732b\u72ac")
    )


def test_a_font_of_the_system_is_used(monkeypatch):
    own = letters._charmaps()[0][0]
    fonts = (
        ["none", own, "/fonts/cjk.ttf"],
        {"none": frozenset(), own: frozenset(b"ab"), "/fonts/cjk.ttf": frozenset((0x732B,))},
    )
    monkeypatch.setattr(letters, "_charmaps", lambda: fonts)
    letters.font_of.cache_clear()
    assert letters.font_of("\u732b") == "/fonts/cjk.ttf"
    assert letters.font_of("\u72ac") is None
    assert str(letters.drawing_options("\u732b")["font"]) == "/fonts/cjk.ttf"
    letters.font_of.cache_clear()


def test_the_sheet_has_every_tile_in_its_place():
    tiles = np.stack(
        [np.full((3, 112, 112), shade, dtype=np.uint8) for shade in (10, 20, 30, 40, 50, 60, 70)]
    )
    sheet = tile_sheet(tiles, TileGrid(columns=3, rows=2, has_thumbnail=True))
    gap = 112 // 16
    shades = [
        [int(sheet[row * (112 + gap) + 5, column * (112 + gap) + 5, 0]) for column in range(4)]
        for row in range(2)
    ]
    assert shades == [[10, 20, 30, 70], [40, 50, 60, 255]]
