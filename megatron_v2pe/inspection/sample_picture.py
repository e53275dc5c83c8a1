"""A pack as one picture: each token's kind, position and owner, and the text and images of the documents.

strip     kinds of tokens, and the context parallel rank that holds each
line      position of every token; images climb by their stride, documents start again at 0
document  its text, supervised text on orange, and its images as the model sees them
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.data.media.cut import UInt8Array
from megatron_v2pe.data.media.medium import load_tile_range
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.inspection.figures import pyplot, save_figure
from megatron_v2pe.inspection.letters import NO_FONT, drawing_options, font_of
from megatron_v2pe.inspection.sample_view import DocumentView, PackView, TokenRun

KIND_COLORS = {"text": "#bbbbbb", "supervised": "#ee8833", "image": "#4477aa", "padding": "#f4f4f4"}
_MOST_DOCUMENTS, _MOST_IMAGES, _COLUMNS, _MOST_LINES = 6, 10, 128, 12
_TILE_PIXELS = 112
_LINE_INCHES, _IMAGE_INCHES, _WIDTH = 0.19, 1.25, 13.0


def write_picture(path: str | Path, view: PackView) -> None:
    """Draw a pack.

    Args:
        path: PNG file to write.
        view: see `sample_view.view_pack`.

    Raises:
        DataError: an image cannot be read.
    """
    plt = pyplot()
    shown = view.documents[:_MOST_DOCUMENTS]
    pages = [_wrapped(document) for document in shown]
    heights = [0.75, 2.1]
    for document, page in zip(shown, pages, strict=True):
        heights += [_LINE_INCHES * (len(page) + 1.5), _IMAGE_INCHES if document.media else 0.05]
    figure = plt.figure(figsize=(_WIDTH, sum(heights) + 1.3), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    strip = figure.add_subplot(grid[0])
    _draw_strip(strip, view)
    _draw_positions(figure.add_subplot(grid[1], sharex=strip), view)
    for place, (document, page) in enumerate(zip(shown, pages, strict=True)):
        _draw_text(figure.add_subplot(grid[2 + 2 * place]), document, page, place)
        if document.media:
            _draw_images(figure, grid[3 + 2 * place], document, view)
    figure.suptitle(_title(view), fontsize=11, x=0.01, ha="left")
    save_figure(figure, path)


def _title(view: PackView) -> str:
    supervised = sum(document.num_supervised for document in view.documents)
    hidden = len(view.documents) - _MOST_DOCUMENTS
    more = f"; the first {_MOST_DOCUMENTS} documents are shown" if hidden > 0 else ""
    return (
        f"{view.title}: {len(view.batch.tokens):,} tokens, {len(view.documents)} documents, {view.batch.num_tiles} "
        f"tiles, {supervised:,} supervised tokens{more}{_undrawn(view)}"
    )


def _draw_strip(axis: Any, view: PackView) -> None:
    """Two bars over the tokens: kind above, owner below."""
    runs = [run for document in view.documents for run in document.runs]
    for kind, color in KIND_COLORS.items():
        spans = [(run.start, run.end - run.start) for run in runs if run.kind == kind]
        axis.broken_barh(
            spans, (1.1, 0.8), color=color, label=kind, hatch="////" if kind == "padding" else None
        )
    rank_colors = pyplot().get_cmap("Set2")
    edges = [0, *(np.flatnonzero(np.diff(view.owners)) + 1).tolist(), len(view.owners)]
    for rank in range(view.cp):
        spans = [(low, high - low) for low, high in pairwise(edges) if view.owners[low] == rank]
        axis.broken_barh(spans, (0.1, 0.8), color=rank_colors(rank % 8), label=f"cp rank {rank}")
    for start in view.batch.layout.cu_seqlens.tolist():
        axis.axvline(start, color="black", linewidth=1)
    axis.set_yticks([0.5, 1.5], ["owner", "kind"])
    axis.set_ylim(0, 2)
    axis.tick_params(labelbottom=False)
    count = 4 + view.cp
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=min(count, 12),
        fontsize=8,
        frameon=False,
        borderpad=0.1,
    )


def _draw_positions(axis: Any, view: PackView) -> None:
    """Position over token index, images marked with their stride."""
    num_tokens = len(view.positions)
    step = max(1, num_tokens // 4000)
    for document in view.documents:
        low, high = document.runs[0].start, document.runs[-1].end
        places = np.unique(np.append(np.arange(low, high, step), high - 1))
        axis.plot(places, view.positions[places], color="black", linewidth=1)
        axis.axvline(low, color="black", linewidth=0.5)
        for run in document.runs:
            if run.image < 0:
                continue
            axis.axvspan(run.start, run.end, color=KIND_COLORS["image"], alpha=0.18, linewidth=0)
            if run.end - run.start > num_tokens / 45:
                axis.annotate(
                    f"{document.strides[run.image]}/{view.tokens_per_tile}",
                    ((run.start + run.end) / 2, run.last_position),
                    fontsize=7,
                    ha="center",
                    va="bottom",
                    color="#224466",
                )
    axis.set_xlim(0, num_tokens)
    axis.set_ylim(bottom=0, top=1.12 * max(float(view.positions.max()), 1.0))
    axis.set_ylabel("position")
    axis.set_xlabel("token of the pack (blue: images with their step; documents start again at 0)")


def _wrapped(document: DocumentView) -> list[list[tuple[str, str]]]:
    """Lines of (kind, text) fragments, at most `_COLUMNS` characters; a long middle is left out."""
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0
    for kind, word in _words(document):
        if word == "\n" or used + len(word) > _COLUMNS:
            lines.append([])
            used = 0
        if word != "\n":
            lines[-1].append((kind, word))
            used += len(word)
    if len(lines) <= _MOST_LINES:
        return lines
    half = _MOST_LINES // 2
    left_out = [("padding", f"... {len(lines) - 2 * half} lines left out ...")]
    return [*lines[:half], left_out, *lines[-half:]]


def _words(document: DocumentView) -> Iterator[tuple[str, str]]:
    """Words with their blanks, line breaks, and one word for each image."""
    for run in document.runs:
        if run.kind == "image":
            yield "image", f"[image {run.image}: {document.num_tiles[run.image]} tiles]"
        elif run.kind != "padding":
            for word in re.findall(r"\n|[^\s]+[^\S\n]*|[^\S\n]+", _drawable(run)):
                for start in range(0, len(word), _COLUMNS):
                    yield run.kind, word[start : start + _COLUMNS]


def _drawable(run: TokenRun) -> str:
    """The text with a dot for what no installed font can draw; the listing has every character."""
    return "".join(letter if letter.isspace() or font_of(letter) else NO_FONT for letter in run.text)


def _undrawn(view: PackView) -> str:
    """A note on letters without a font; empty if all can be drawn."""
    texts = [run.text for document in view.documents[:_MOST_DOCUMENTS] for run in document.runs]
    count = sum(not letter.isspace() and font_of(letter) is None for text in texts for letter in text)
    if not count:
        return ""
    return (
        f"\n{count:,} letters are drawn as {NO_FONT}, because no installed font has them (for Chinese, Japanese "
        "and Korean install fonts-noto-cjk); the list has them all"
    )


def _draw_text(
    axis: Any, document: DocumentView, lines: Sequence[Sequence[tuple[str, str]]], number: int
) -> None:
    axis.set_axis_off()
    axis.set_xlim(0, _COLUMNS + 2)
    axis.set_ylim(len(lines) + 0.2, -1.3)
    runs = document.runs
    axis.text(
        0,
        -0.6,
        f"document {number}: {document.sample_id}, tokens {runs[0].start}..{runs[-1].end - 1}, "
        f"{len(document.images)} images, {document.num_supervised} supervised",
        fontsize=9,
        weight="bold",
        va="center",
    )
    backgrounds = {"supervised": "#ffd9b3", "image": "#cfe0f2"}
    for row, fragments in enumerate(lines):
        column = 0
        for kind, text in _joined(fragments):
            if kind in backgrounds:
                axis.barh(row + 0.5, len(text), 0.92, left=column, color=backgrounds[kind], linewidth=0)
            for offset, letter in enumerate(text):
                if letter != " ":  # one by one, so that colors and letters meet in every font
                    axis.text(column + offset + 0.5, row + 0.55, letter, ha="center", va="center", parse_math=False,
                              **drawing_options(letter))  # fmt: skip
            column += len(text)


def _joined(fragments: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Neighbours of one kind joined."""
    kind, text = "", ""
    for next_kind, word in fragments:
        if next_kind != kind and text:
            yield kind, text
            text = ""
        kind, text = next_kind, text + word
    if text:
        yield kind, text


def tile_sheet(tiles: UInt8Array, grid: TileGrid) -> UInt8Array:
    """The tiles of an image side by side, white gaps between them.

    Args:
        tiles: uint8 [n, 3, S, S], row by row, the thumbnail last.
        grid: how the image was cut.

    Returns:
        uint8 [height, width, 3], each tile reduced to about 112 pixels.
    """
    step = max(1, tiles.shape[-1] // _TILE_PIXELS)
    small = tiles[:, :, ::step, ::step].transpose(0, 2, 3, 1)  # [n, 3, s, s] -> [n, s, s, 3]
    size, gap = small.shape[1], max(2, small.shape[1] // 16)
    columns = grid.columns + grid.has_thumbnail
    sheet = np.full((grid.rows * (size + gap) - gap, columns * (size + gap) - gap, 3), 255, dtype=np.uint8)
    for number, tile in enumerate(small):
        row, column = divmod(number, grid.columns)
        if grid.has_thumbnail and number == len(small) - 1:
            row, column = 0, grid.columns
        top, left = row * (size + gap), column * (size + gap)
        sheet[top : top + size, left : left + size] = tile
    return sheet


def _draw_images(figure: Any, cell: Any, document: DocumentView, view: PackView) -> None:
    """All tiles of each image as the model sees them: the grid with gaps, and the thumbnail at its right."""
    shown = document.images[:_MOST_IMAGES]
    axes = cell.subgridspec(1, _MOST_IMAGES).subplots(squeeze=False)[0]
    firsts = np.cumsum([0, *document.num_tiles])
    for number, axis in enumerate(axes):
        if number >= len(shown):
            axis.set_axis_off()
            continue
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="0.6", linewidth=0.5)  # a white image has an edge on white paper
        grid = shown[number][1].grid
        tile_range = (int(firsts[number]), int(firsts[number + 1]))
        tiles = load_tile_range(document.media, image_size=view.image_size, tile_range=tile_range)
        axis.imshow(tile_sheet(tiles, grid))
        text = f"{grid.columns}x{grid.rows}{'+1' if grid.has_thumbnail else ''}"
        stride = f"{document.strides[number]}/{view.tokens_per_tile}"
        axis.set_title(f"image {number}: {text}, {stride}", fontsize=7)
    hidden = len(document.images) - len(shown)
    if hidden > 0:
        axes[-1].text(1.05, 0.5, f"+{hidden}", transform=axes[-1].transAxes, fontsize=9, va="center")
