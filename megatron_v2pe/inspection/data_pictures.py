"""Pictures of a mixture: lengths, tiles, shares of the sources, packs, and how evenly steps load the ranks.

Every picture says what it counts and over how many; epochs, not files, decide what a model
sees, so shares are those of an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.report import DatasetRow, PlanReport
from megatron_v2pe.inspection.figures import pyplot

_MOST_SOURCES = 24  # rows of the picture of shares; smaller ones are joined


def draw_pictures(
    indexes: Sequence[DatasetIndex], rows: Sequence[DatasetRow], plan: PlanReport | None
) -> dict[str, Any]:
    """Figures by the name of their file.

    Args:
        indexes: measured data sets.
        rows: see `data.report.describe_datasets`.
        plan: see `data.report.describe_plan`; None leaves out what needs a plan.
    """
    pictures = {"lengths.png": _lengths(indexes, rows), "tiles.png": _tiles(indexes)}
    if plan is not None:
        pictures |= {"sources.png": _sources(rows), "packing.png": _packing(plan)}
    if plan is not None and any(len(values) for values in plan.imbalances.values()):
        pictures["imbalance.png"] = _imbalance(plan)
    return pictures


def _k(number: float, _place: int = 0) -> str:
    """256K, 1.5M."""
    for unit, text in ((2**20, "M"), (2**10, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{text}"
    return f"{number:g}"


def _count_whole(axis: Any) -> None:
    """Ticks at whole numbers only: of a few samples, 2.5 would be labelled 2."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _lengths(indexes: Sequence[DatasetIndex], rows: Sequence[DatasetRow]) -> Any:
    """Samples and tokens by length, in doubling steps cut in four."""
    plt = pyplot()
    lengths = np.concatenate([np.asarray(index.num_tokens) for index in indexes])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    low, high = np.log2(max(lengths.min(), 1)) if len(lengths) else 0, np.log2(max(lengths.max(initial=2), 2))
    edges = 2 ** np.arange(np.floor(low), np.ceil(high) + 0.25, 0.25)
    for axis, weights, what in ((axes[0], None, "samples"), (axes[1], lengths, "tokens")):
        axis.hist(lengths, bins=edges, weights=weights, color="#4477aa", edgecolor="white", linewidth=0.4)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(_k)
        axis.set_xlabel("length of a sample in tokens (log scale)")
        axis.set_ylabel(what)
        _count_whole(axis.yaxis)
    total = int(lengths.sum())
    figure.suptitle(
        f"Lengths: {len(lengths):,} samples, {total:,} tokens, {sum(row.bad for row in rows):,} bad lines left out"
    )
    return figure


def _tiles(indexes: Sequence[DatasetIndex]) -> Any:
    """Samples by their number of tiles; text samples are counted in the title."""
    plt = pyplot()
    tiles = np.concatenate([np.asarray(index.num_tiles) for index in indexes])
    shown = tiles[tiles > 0]
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    if len(shown):
        most = int(shown.max())
        # Up to 32 every number has its bar; beyond, bars are as wide as they look on the log scale.
        edges = np.arange(1, most + 1) if most <= 32 else np.unique(np.geomspace(1, most + 1, 40).astype(int))
        edges = edges - 0.5
        axis.hist(
            shown,
            bins=np.append(edges, most + 0.5) if edges[-1] < most + 0.5 else edges,
            color="#228833",
            edgecolor="white",
            linewidth=0.4,
        )
        if most > 32:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(_k)
            axis.set_xlim(0.8 * shown.min(), 1.25 * most)
    axis.set_xlabel(f"tiles of a sample{' (log scale)' if axis.get_xscale() == 'log' else ''}")
    axis.set_ylabel("samples")
    _count_whole(axis.yaxis)
    axis.set_title(
        f"Tiles: {int(tiles.sum()):,} in {len(shown):,} samples; {len(tiles) - len(shown):,} samples are text only",
        fontsize=11,
    )
    return figure


def _sources(rows: Sequence[DatasetRow]) -> Any:
    """Share of each data set in what an epoch draws, by samples and by tokens."""
    plt = pyplot()
    ordered = sorted(rows, key=lambda row: row.drawn_tokens)
    small, shown = ordered[: max(0, len(ordered) - _MOST_SOURCES)], ordered[-_MOST_SOURCES:]
    names = [row.name for row in shown]
    draws, tokens = [row.draws for row in shown], [row.drawn_tokens for row in shown]
    if small:
        names.insert(0, f"{len(small)} smaller ones")
        draws.insert(0, sum(row.draws for row in small))
        tokens.insert(0, sum(row.drawn_tokens for row in small))
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.42 * len(names)), layout="constrained")
    places = np.arange(len(names))
    for offset, values, what, color in (
        (0.2, tokens, "tokens", "#4477aa"),
        (-0.2, draws, "samples", "#ccbb44"),
    ):
        shares = np.array(values) / max(sum(values), 1)
        axis.barh(places + offset, shares, 0.38, label=what, color=color)
        for place, share in zip(places, shares, strict=True):
            axis.text(share, place + offset, f" {share:.1%}", va="center", fontsize=8)
    axis.set_yticks(places, names)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share of an epoch, repeats counted")
    axis.set_title(
        f"Sources: an epoch draws {sum(draws):,} samples, {sum(tokens):,} tokens", fontsize=11, loc="left"
    )
    figure.legend(loc="outside lower right", ncols=2, frameon=False)  # bars are anywhere inside
    return figure


def _packing(plan: PlanReport) -> Any:
    """Fill, samples and cost of the packs."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    fills: dict[str, tuple[Any, dict[str, Any]]] = {
        "tokens": (100 * plan.tokens / plan.max_pack_tokens, {"color": "#4477aa"}),
        "tiles": (
            100 * plan.tiles / plan.max_pack_tiles,
            {"color": "#228833", "histtype": "step", "linewidth": 1.5},
        ),
    }
    emptiest = min(95.0, *(float(fill.min()) for fill, _ in fills.values()))
    for name, (fill, style) in fills.items():
        axes[0].hist(fill, bins=np.linspace(emptiest, 100, 41), label=name, **style)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("fill of a pack in % of its budget")
    axes[0].set_ylim(bottom=0.5)  # a bar of one pack has a height
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    is_few = len(plan.tokens) < 20  # without tens on the axis, ones are labelled
    axes[0].yaxis.set_minor_formatter(lambda value, _: f"{value:.0f}" if is_few and value > 1 else "")
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    few, many = int(plan.samples.min()), int(plan.samples.max())
    edges = np.arange(few, many + 2, max(1, (many - few) // 40)) - 0.5
    axes[1].hist(plan.samples, bins=edges, color="#ccbb44")
    axes[1].set_xlabel("samples of a pack")
    axes[2].hist(plan.costs / plan.costs.mean(), bins=40, color="#ee6677")
    axes[2].set_xlabel("cost of a pack over the mean")
    for axis, what in zip(axes, ("packs (log scale)", "packs", "packs"), strict=True):
        axis.set_ylabel(what)
    _count_whole(axes[1].xaxis)
    for axis in axes[1:]:
        _count_whole(axis.yaxis)
    figure.suptitle(
        f"Packs of an epoch: {len(plan.tokens):,} of {_k(plan.max_pack_tokens)} tokens ({plan.fill:.2%} full) and "
        f"{plan.max_pack_tiles:,} tiles ({plan.tile_fill:.2%} full), {plan.samples.mean():.1f} samples each"
    )
    return figure


def _imbalance(plan: PlanReport) -> Any:
    """Slowest rank over the mean, by data parallel size, as planned and in random order."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    sizes = [size for size, values in plan.imbalances.items() if len(values)]
    for found, name, color, shift in (
        (plan.random_imbalances, "same packs, random order, assigned in turn", "#bbbbbb", 0.04),
        (plan.imbalances, "as planned", "#4477aa", -0.04),
    ):
        means = np.array([found[size].mean() for size in sizes])
        spread = np.abs(
            [np.quantile(found[size], (0.05, 0.95)) for size in sizes] - means[:, None]
        ).T  # [2, n]
        axis.errorbar(
            np.arange(len(sizes)) + shift, means, spread, marker="o", capsize=3, label=name, color=color
        )
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axis.set_xlabel("data parallel ranks")
    axis.set_ylabel("cost of the slowest rank over the mean")
    axis.set_ylim(bottom=1.0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_title(
        f"Imbalance of steps of {plan.step_text} packs (bars: 5th to 95th percentile of the steps)",
        fontsize=11,
    )
    axis.legend()
    return figure
