"""Curves of a run, or of two on the same axes, on one page; and the loss curve of a metrics file alone.

    RunRecord --> loss, by data set, gradient norms | learning rate, tokens/s, TFLOP/s | seconds, memory, padding

A panel is data: which numbers of metrics.jsonl it shows under which names. The colors of one run are those of a
panel's series; with two runs colors say which run, and dashes which series. Noisy numbers are drawn faint below their
mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.inspection.figures import pyplot, save_figure
from megatron_v2pe.inspection.runs import RunRecord, read_metrics

_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 4)))
_SHOWN_SOURCES = 8
_SMOOTHED_SHARE = 0.04  # of the steps are one mean
_FEW = 30
_CUT_PERCENTILE = 98.0  # an axis from zero ends a little above it, or one stall would flatten the rest
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: with the unit.
        series: name in the legend to the number in metrics.jsonl.
        is_log: logarithmic axis.
        from_zero: the axis begins at zero.
        is_noisy: a moving mean is drawn.
        marks: steps of a run that are marked, and how they are called.
        scale: numbers are multiplied by it.
    """

    title: str
    series: dict[str, str]
    is_log: bool = False
    from_zero: bool = False
    is_noisy: bool = True
    marks: tuple[str, str] | None = None
    scale: float = 1.0


LOSS = Panel(title="loss, nats per token", series={"loss": "loss"}, marks=("bad_steps", "steps not applied"))
SOURCES = Panel(title="loss by data set", series={})
LEARNING_RATE = Panel(title="learning rate", series={"lr": "lr"}, from_zero=True, is_noisy=False)
PANELS = (
    Panel(
        title="gradient norm",
        series={"all": "grad_norm"}
        | {part: f"grad_norm_{part}" for part in ("language", "vision", "projector")},
        is_log=True,
    ),
    LEARNING_RATE,
    Panel(
        title="tokens/s",
        series={
            "all": "tokens_per_s",
            "visual": "visual_tokens_per_s",
            "supervised": "supervised_tokens_per_s",
        },
        from_zero=True,
    ),
    Panel(
        title="TFLOP/s of a rank",
        series={"causal pairs": "tflops_per_rank", "all pairs": "tflops_per_rank_full_attention"},
        from_zero=True,
    ),
    Panel(
        title="seconds of a step",
        series={
            "step": "step_s",
            "communication, who waits most": "comm_wait_s_max",
            "who waits least": "comm_wait_s_min",
            "data, slowest rank": "data_s_max",
            "saves": "save_s",
        },
        from_zero=True,
        marks=("stalls", "stalls, may be cut off"),
    ),
    Panel(
        title="memory of the fullest rank, GiB",
        series={"used": "peak_mem_gib", "reserved": "reserved_mem_gib"},
        from_zero=True,
        is_noisy=False,
    ),
    Panel(title="padding, % of tokens", series={"padding": "padding_share"}, from_zero=True, scale=100.0),
)


def draw_curves(runs: Sequence[RunRecord], out: Path) -> None:
    """Draw all panels as PNG; steps without a number are gaps, steps not applied are marked at the loss.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    figure = pyplot().figure(figsize=(16, 10), layout="constrained")
    loss, by_source, *others = figure.subplots(3, 3).flat
    _draw_panel(loss, LOSS, runs)
    _draw_sources(by_source, runs)
    for axes, panel in zip(others, PANELS, strict=True):
        _draw_panel(axes, panel, runs)
    _tidy_axes(figure, bottom_row=3)
    _name_runs(figure, runs)
    save_figure(figure, out)


def write_loss_curve(path: str | Path, metrics_path: str | Path) -> None:
    """Draw loss and learning rate over the steps of a run's `metrics.jsonl`.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: no such file, no step in it, or a line without step, loss and lr.
    """
    lines = read_metrics(metrics_path, needed=("step", "loss", "lr"))
    bad_steps = tuple(line["step"] for line in lines if line.get("is_applied") is False)
    run = RunRecord(run_dir=Path(metrics_path).parent, lines=lines, bad_steps=bad_steps)
    figure = pyplot().figure(figsize=(10, 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2).flat, (LOSS, LEARNING_RATE), strict=True):
        _draw_panel(axes, panel, [run])
    _tidy_axes(figure, bottom_row=2)
    _name_runs(figure, [run])
    save_figure(figure, path)


def _tidy_axes(figure: Any, *, bottom_row: int) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[-bottom_row:]:
        axes.set_xlabel("step")


def moving_mean(values: Values, *, window: int) -> Values:
    """Mean over `window` values around each, fewer at the ends.

    Example: [1, 2, 6, 0] with window 3 is [1.5, 3, 8/3, 3].
    """
    before, after = (window - 1) // 2, window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - before, 0), np.minimum(places + after + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    """Series by color, or by dashes where colors say which run; then only the first run's are in the legend."""
    axes.set_title(panel.title, fontsize=11)
    largest = []
    for number, run in enumerate(runs):
        for place, (label, key) in enumerate(panel.series.items()):
            values = panel.scale * _values(line.get(key) for line in run.lines)
            if not np.isfinite(values).any():
                continue
            is_single = len(runs) == 1
            color, dashes = f"C{place if is_single else number}", "-" if is_single else _DASHES[place]
            shown = label if number == 0 and len(panel.series) > 1 else None
            _draw(axes, run, values, color=color, dashes=dashes, label=shown, is_noisy=panel.is_noisy)
            largest.append(np.nanpercentile(values, _CUT_PERCENTILE))
    if panel.marks and largest:
        _mark(axes, panel.marks, runs)
    _finish(axes, panel, top=1.25 * max(largest, default=0.0))


def _draw_sources(axes: Any, runs: Sequence[RunRecord]) -> None:
    """Loss of each data set; those with the most weight where there are many."""
    names = sources(runs)
    more = f", {_SHOWN_SOURCES} of {len(names)}" if len(names) > _SHOWN_SOURCES else ""
    axes.set_title(f"{SOURCES.title}{more}", fontsize=11)
    for place, name in enumerate(names[:_SHOWN_SOURCES]):
        for number, run in enumerate(runs):
            values = _values(line.get("loss_by_source", {}).get(name) for line in run.lines)
            label = name if number == 0 else None
            _draw(axes, run, values, color=f"C{place}", dashes=_DASHES[number], label=label)
    _finish(axes, SOURCES, top=0.0)


def sources(runs: Sequence[RunRecord]) -> list[str]:
    """Data sets of all runs, by their weight in the loss."""
    weights: dict[str, float] = {}
    for line in (line for run in runs for line in run.lines):
        for name, weight in line.get("weight_by_source", {}).items():
            weights[name] = weights.get(name, 0.0) + (weight or 0.0)
    return sorted(weights, key=lambda name: -weights[name])


def _draw(
    axes: Any,
    run: RunRecord,
    values: Values,
    *,
    color: str,
    dashes: Any,
    label: str | None,
    is_noisy: bool = True,
) -> None:
    """A faint line of all known values and their moving mean; points where there are few."""
    known = np.isfinite(values)
    steps, values = np.array([line["step"] for line in run.lines])[known], values[known]
    window = int(_SMOOTHED_SHARE * len(values)) if is_noisy else 1
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
    marker = "o" if len(values) <= _FEW else None
    means = moving_mean(values, window=max(1, window))
    axes.plot(steps, means, linestyle=dashes, color=color, linewidth=1.6, marker=marker, ms=3, label=label)


def _mark(axes: Any, marks: tuple[str, str], runs: Sequence[RunRecord]) -> None:
    """Crosses at the lower edge, one row for each run."""
    attribute, label = marks
    for number, run in enumerate(runs):
        if steps := getattr(run, attribute):
            heights = np.full(len(steps), 0.02 + 0.03 * number)  # share of the axis
            color = "tab:red" if len(runs) == 1 else f"C{number}"
            across = axes.get_xaxis_transform()
            shown = None if label in axes.get_legend_handles_labels()[1] else label
            axes.plot(steps, heights, "x", color=color, transform=across, label=shown, clip_on=False)


def _finish(axes: Any, panel: Panel, *, top: float) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="0.5")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if panel.is_log:
        axes.set_yscale("log")
    elif top >= 10_000:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if panel.from_zero:
        axes.set_ylim(0.0, top or 1.0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="best")


def _name_runs(figure: Any, runs: Sequence[RunRecord]) -> None:
    """Names above all panels; those of two with their colors, and with their dashes in the panel of the data sets."""
    names = [f"{run.run_dir.name}, steps {run.lines[0]['step']} to {run.lines[-1]['step']}" for run in runs]
    if len(runs) == 1:
        figure.suptitle(names[0], fontsize=13)
        return
    lines = pyplot().Line2D
    dashes = ["solid", "dashed"]
    handles = [lines([], [], color=f"C{number}", linewidth=3) for number in range(len(runs))]
    shown = [f"{name} ({dash} by data set)" for name, dash in zip(names, dashes, strict=True)]
    figure.legend(handles, shown, loc="outside upper center", ncols=2, fontsize=12, frameon=False)


def _values(numbers: Iterable[float | None]) -> Values:
    return np.array([np.nan if number is None else number for number in numbers], dtype=np.float64)
