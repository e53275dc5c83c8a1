"""Pictures of benchmark scores: where in long documents answers are right, and with which stride.

    heatmap_<stride>.png     length x depth of each task, the paper's figure 1
    accuracy_by_length.png   a line a stride, log2 of the length
    stride_sweep.png         stride x length: which stride to serve
    against_the_card.png     bars beside the released model's numbers

Scales are fixed (0..1). A cell without an answer is grey, never zero. The trained length is a dashed line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.evaluation.benchmarks.base import ScoreCell
from megatron_v2pe.evaluation.jobs.report import StrideScore
from megatron_v2pe.evaluation.retrieval.report import wilson
from megatron_v2pe.inspection.figures import pyplot, save_figure

_COLUMNS = 3


def write_pictures(
    folder: Path, title: str, scores: Sequence[StrideScore], *, trained_length: int, tokens_per_tile: int
) -> list[Path]:
    """Draw what the scores allow; returns the files.

    Args:
        folder: where to.
        title: of the benchmark.
        scores: one a stride.
        trained_length: positions that the checkpoint was trained for; 0 draws no line.
        tokens_per_tile: the largest stride; 0 where it is not known.
    """
    drawn = []
    known = [item for item in scores if item.score is not None]
    for item in known:
        assert item.score is not None
        placed = [cell for cell in item.score.cells if cell.depth is not None]
        if placed:
            path = folder / f"heatmap_{item.name}.png"
            name = f"{title}, {stride_text(item.name, tokens_per_tile)}"
            write_heat_maps(
                path, placed, lengths=item.score.lengths, title=name, trained_length=trained_length
            )
            drawn.append(path)
    if any(item.score and item.score.lengths for item in known):
        path = folder / "accuracy_by_length.png"
        write_lines(path, title, known, trained_length=trained_length, tokens_per_tile=tokens_per_tile)
        drawn.append(path)
        if len(known) > 1:
            path = folder / "stride_sweep.png"
            write_sweep(path, title, known, trained_length=trained_length)
            drawn.append(path)
    return drawn


def write_heat_maps(
    path: Path, cells: Sequence[ScoreCell], *, lengths: Sequence[int], title: str, trained_length: int
) -> None:
    """One panel a task: length (x) by depth (y, start of the document on top).

    Args:
        path: PNG file.
        cells: with length and depth.
        lengths: lower ends of the ranges, the axis of all panels.
        title: of the picture.
        trained_length: a dashed line follows the last range that begins within it; 0 draws none.
    """
    plt = pyplot()
    tasks = list(dict.fromkeys(cell.group for cell in cells))
    depths = sorted({0.0, 0.2, 0.4, 0.6, 0.8} | {cell.depth for cell in cells if cell.depth is not None})
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (max(5.0, 0.62 * len(lengths) + 1.0) * columns, (0.5 * len(depths) + 1.4) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[len(tasks) :]:
        spare.axis("off")
    for task, panel in zip(tasks, axes.flat, strict=False):
        own = [cell for cell in cells if cell.group == task]
        image = _panel(panel, own, lengths, depths, trained_length)
        panel.set_title(f"{task}, mean {np.mean([cell.mean for cell in own]):.3f}", fontsize=10)
    figure.colorbar(image, ax=axes, label="score (0..1)", shrink=0.8)
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)


def _panel(
    panel: Any, cells: Sequence[ScoreCell], lengths: Sequence[int], depths: Sequence[float], trained: int
) -> Any:
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        assert cell.length is not None
        assert cell.depth is not None
        row, column = depths.index(cell.depth), list(lengths).index(cell.length)
        grid[row, column] = cell.mean
        panel.text(
            column, row, f"{100 * cell.mean:.0f}\nn={cell.count}", ha="center", va="center", fontsize=6
        )
    image = _draw_grid(panel, grid)
    panel.set_xticks(range(len(lengths)), [length_text(n) for n in lengths], fontsize=8)
    panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    panel.set_xlabel("document length (tokens, from)")
    panel.set_ylabel("depth of the needle (0 = start)")
    _trained_line(panel, lengths, trained)
    return image


def _draw_grid(panel: Any, grid: NDArray[np.float64]) -> Any:
    """Colors of a grid, grey where it is NaN, a dash there."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("score", ["#e8596f", "#f3cf63", "#3fbf8f"])
    image = panel.imshow(
        np.ma.masked_invalid(grid), cmap=shades.with_extremes(bad="0.85"), vmin=0, vmax=1, aspect="auto"
    )
    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            panel.text(column, row, "-", ha="center", va="center", fontsize=7)
    return image


def _trained_line(panel: Any, lengths: Sequence[int], trained: int) -> None:
    within = sum(length < trained for length in lengths)
    if 0 < within < len(lengths):
        panel.axvline(within - 0.5, color="black", linestyle="--", linewidth=1.2)


def by_length(item: StrideScore) -> dict[int, tuple[float, float, int]]:
    """(mean over tasks, sum of scores, rows) at each length that has an answer; each task counts once."""
    assert item.score is not None
    found = {}
    for length in item.score.lengths:
        own = [cell for cell in item.score.cells if cell.length == length]
        tasks = list(dict.fromkeys(cell.group for cell in own))
        if tasks:
            means = [float(np.mean([cell.mean for cell in own if cell.group == task])) for task in tasks]
            count = sum(cell.count for cell in own)
            found[length] = float(np.mean(means)), sum(cell.total for cell in own), count
    return found


def write_lines(
    path: Path, title: str, scores: Sequence[StrideScore], *, trained_length: int, tokens_per_tile: int
) -> None:
    """One line of the mean over tasks by length for each stride, with 95 % Wilson intervals of its rows."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    shown: set[int] = set()
    for index, item in enumerate(scores):
        points = by_length(item)
        shown |= set(points)
        lengths = np.array(list(points), dtype=float) * (1 + 0.015 * index)  # so that bars stay apart
        means = np.array([mean for mean, _, _ in points.values()])
        bounds = [wilson(total, count) for _, total, count in points.values()]
        spread = np.array(
            [(max(0.0, m - low), max(0.0, high - m)) for m, (low, high) in zip(means, bounds, strict=True)]
        ).T
        label = stride_text(item.name, tokens_per_tile)
        axes.errorbar(lengths, means, spread.reshape(2, -1), marker="o", capsize=2, label=label)
    axes.set_xscale("log", base=2)
    ticks = sorted(shown)
    axes.set_xticks(ticks, [length_text(n) for n in ticks], fontsize=8)
    if trained_length:
        axes.axvline(trained_length, color="0.4", linestyle="--", label="trained length")
    ends = [*ticks, trained_length or ticks[0]]
    axes.set_xlim(min(ends) / 1.3, max(ends) * 1.3)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("document length (tokens)")
    axes.set_ylabel("score, mean over tasks (0..1)")
    axes.set_title(f"{title} by length; bars are 95 % intervals", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def write_sweep(path: Path, title: str, scores: Sequence[StrideScore], *, trained_length: int) -> None:
    """Stride (y) by length (x): the row that is green where it is needed is the stride to serve."""
    plt = pyplot()
    points = {item.name: by_length(item) for item in scores}
    lengths = sorted({length for line in points.values() for length in line})
    grid = np.array([[line.get(n, (np.nan, 0, 0))[0] for n in lengths] for line in points.values()])
    size = (max(5.5, 0.75 * len(lengths) + 2), 0.5 * len(points) + 1.9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = _draw_grid(axes, grid)
    for row, line in enumerate(points.values()):
        for length, (mean, _, count) in line.items():
            label = f"{100 * mean:.0f}\nn={count}"
            axes.text(lengths.index(length), row, label, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(lengths)), [length_text(n) for n in lengths], fontsize=8)
    axes.set_yticks(range(len(points)), list(points), fontsize=8)
    axes.set_xlabel("document length (tokens)")
    axes.set_ylabel("stride")
    _trained_line(axes, lengths, trained_length)
    figure.colorbar(image, ax=axes, label="score (0..1)")
    axes.set_title(f"{title}: mean over tasks", fontsize=11)
    save_figure(figure, path)


def write_card_bars(path: Path, ours: Mapping[str, float], card: Mapping[str, float]) -> None:
    """Bars of our numbers beside the released model's, in percent."""
    plt = pyplot()
    names = list(ours)
    places = np.arange(len(names))
    figure, axes = plt.subplots(figsize=(max(5.0, 0.8 * len(names) + 2), 4.0), layout="constrained")
    for shift, (label, values) in enumerate((("ours", ours), ("model card", card))):
        heights = [values.get(name, np.nan) for name in names]
        bars = axes.bar(places + 0.4 * shift - 0.2, heights, 0.38, label=label)
        axes.bar_label(bars, [f"{h:.1f}" if not np.isnan(h) else "" for h in heights], fontsize=7)
    axes.set_xticks(places, names, rotation=30, ha="right", fontsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel("percent")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def stride_text(name: str, tokens_per_tile: int) -> str:
    """A stride in words; `recorded` stays as it is."""
    if name == "recorded" or not tokens_per_tile:
        return name
    return f"stride {tokens_per_tile if name == 'default' else name}/{tokens_per_tile}" + (
        " (default)" if name == "default" else ""
    )


def length_text(tokens: int) -> str:
    """A length as people write it.

    Example: 512, 4096, 12000, 128000, 1048576 are "512", "4K", "12K", "128K", "1M".
    """
    for unit, name in ((10**6, "M"), (2**20, "M"), (1000, "K"), (1024, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens / 1000:.1f}K" if tokens >= 10_000 else str(tokens)
