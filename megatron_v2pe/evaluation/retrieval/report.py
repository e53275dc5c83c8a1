"""Tables and pictures of a retrieval evaluation.

    cells --> table on stdout, cells.csv, heatmap_<stride>.png, accuracy_by_length.png

Scales are fixed (accuracy 0..1), cells without answers are grey and never zero, and every picture says how
many answers it rests on. matplotlib is imported when a picture is drawn: it belongs to the extra `eval`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.evaluation.retrieval.questions import Cell, by_length
from megatron_v2pe.inspection.figures import pyplot, save_figure


def accuracy_table(scores: Mapping[str, Sequence[Cell]], *, trained_length: int) -> str:
    """Accuracy by stride and length as text, with the number of answers in the last row.

    Args:
        scores: cells of each stride, by its name.
        trained_length: positions the checkpoint was trained for; lengths are given as multiples of it.
    """
    totals = {name: by_length(cells) for name, cells in scores.items()}
    lengths = sorted({length for rows in totals.values() for length in rows})
    header = ["stride", *(f"{length} ({_multiple(length, trained_length)})" for length in lengths)]
    rows = [
        [name, *(f"{cells[length].accuracy:.3f}" if length in cells else "-" for length in lengths)]
        for name, cells in totals.items()
    ]
    counts = ["answers", *(str(max(c[n].count for c in totals.values() if n in c)) for n in lengths)]
    return "\n".join(text_table(header, [None, *rows, None, counts], align=">"))


def cells_csv(scores: Mapping[str, Sequence[Cell]]) -> str:
    """All cells as comma separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stride", "length", "depth", "correct", "count", "accuracy"])
    for name, cells in scores.items():
        writer.writerows([name, c.length, c.depth, c.correct, c.count, f"{c.accuracy:.4f}"] for c in cells)
    return text.getvalue()


def write_heat_map(
    path: str | Path, cells: Sequence[Cell], *, stride: str, tokens_per_tile: int, trained_length: int
) -> None:
    """Draw accuracy by length (x) and needle depth (y, start of the document on top) of one stride.

    Args:
        path: PNG file to write.
        cells: scores of the stride.
        stride: its name, for the title.
        tokens_per_tile: visual tokens of one tile, for the title.
        trained_length: a dashed line follows the longest length within it.
    """
    plt = pyplot()
    lengths, depths = sorted({c.length for c in cells}), sorted({c.depth for c in cells})
    grid, counts = _grid(cells, lengths, depths)
    width, height = 2.4 + 1.15 * len(lengths), 2.0 + 0.55 * len(depths)
    figure, axes = plt.subplots(figsize=(max(width, 5.2), height), layout="constrained")
    colors = _heat_colors()
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=colors, vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        label = "-" if np.isnan(value) else f"{value:.2f}\nn={counts[row, column]}"
        axes.text(column, row, label, ha="center", va="center", fontsize=9, color="black")
    axes.set_xticks(range(len(lengths)), [f"{n}\n({_multiple(n, trained_length)})" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("sample length in tokens (multiple of the trained length)")
    axes.set_ylabel("needle depth (0 = first image)")
    within = sum(length <= trained_length for length in lengths)
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color="black", linestyle="--", linewidth=1.5)
    axes.set_title(f"{_stride_text(stride, tokens_per_tile)}, mean {_mean(cells):.2f}", fontsize=11)
    figure.colorbar(image, ax=axes, label="exact-match accuracy (0..1)")
    save_figure(figure, path)


def write_accuracy_by_length(
    path: str | Path, scores: Mapping[str, Sequence[Cell]], *, tokens_per_tile: int, trained_length: int
) -> None:
    """Draw one line of accuracy over length per stride, with 95 % Wilson intervals."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for index, (name, cells) in enumerate(scores.items()):
        totals = by_length(cells)
        lengths = np.array(list(totals), dtype=float) * (
            1 + 0.02 * index
        )  # so that bars do not cover each other
        values = np.array([cell.accuracy for cell in totals.values()])
        bounds = np.array([wilson(cell.correct, cell.count) for cell in totals.values()])
        spread = np.abs(bounds.T - values)
        axes.errorbar(
            lengths, values, spread, marker="o", capsize=3, label=_stride_text(name, tokens_per_tile)
        )
    all_lengths = sorted({cell.length for cells in scores.values() for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(all_lengths, [f"{n}\n({_multiple(n, trained_length)})" for n in all_lengths])
    axes.axvline(trained_length, color="0.4", linestyle="--", label="trained length")
    # Not by what is drawn: with a single length, the small shifts between strides would fill the whole axis.
    shown = [*all_lengths, trained_length]
    axes.set_xlim(min(shown) / 1.25, max(shown) * 1.25)
    axes.set_ylim(0.0, 1.03)
    axes.set_xlabel("sample length in tokens (multiple of the trained length)")
    axes.set_ylabel("exact-match accuracy (0..1)")
    axes.set_title("Retrieval by length; bars are 95 % intervals", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, path)


def wilson(correct: float, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share; right also near 0 and 1, where the normal one is not.

    Example: 10 of 10 gives (0.72, 1.0).
    """
    z = 1.96
    share, square = correct / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z * np.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _grid(
    cells: Sequence[Cell], lengths: Sequence[int], depths: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Accuracy (NaN where nothing was asked) and count, both [depths, lengths]."""
    grid = np.full((len(depths), len(lengths)), np.nan)
    counts = np.zeros(grid.shape, dtype=np.int64)
    for cell in cells:
        place = depths.index(cell.depth), lengths.index(cell.length)
        grid[place], counts[place] = cell.accuracy, cell.count
    return grid, counts


def _mean(cells: Sequence[Cell]) -> float:
    """Mean over cells, each with the same weight, as retrieval scores are usually given."""
    return float(np.mean([cell.accuracy for cell in cells]))


def _multiple(length: int, trained_length: int) -> str:
    """A length as a multiple of the trained one, in few digits.

    Example: of 512, lengths 40, 100, 512, 4096 are "<0.1x", "0.2x", "1x", "8x".
    """
    ratio = length / trained_length
    return "<0.1x" if ratio < 0.1 else f"{ratio:.2g}x" if ratio < 1 else f"{ratio:.4g}x"


def _stride_text(name: str, tokens_per_tile: int) -> str:
    if name == "default":
        return f"default step ({tokens_per_tile}/{tokens_per_tile})"
    return f"stride {name}/{tokens_per_tile}"


def _heat_colors() -> Any:
    """Red, yellow, green, all light enough for black numbers; grey where nothing was asked."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("retrieval", ["#e8596f", "#f3cf63", "#3fbf8f"])
    return colors.with_extremes(bad="0.85")
