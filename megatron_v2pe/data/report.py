"""What a mixture holds and how it is packed, as numbers: the table of `index-data`, and what its pictures draw.

indexes --describe_datasets--> one row per data set        plan --describe_plan--> fill, cost, imbalance of epoch 0
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.config.batch_schedule import BatchSchedule
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.plan.balance import assign_packs, imbalance, whole_steps
from megatron_v2pe.data.plan.epoch_plan import MixturePlan
from megatron_v2pe.data.samples.notes import notice_text
from megatron_v2pe.v2pe.layout import Int64Array

_MAX_STEPS = 400  # that are simulated, evenly spread over the epoch


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """One data set: what was measured, and what an epoch draws of it.

    `parts` counts samples that are parts of long ones, `cut` those whose text was cut, `lost` images that lose
    something by rule (see `media.traits`).
    """

    name: str
    samples: int
    bad: int
    parts: int
    cut: int
    lost: int
    tokens: int
    supervised: int
    tiles: int
    images: int
    median_tokens: int
    p95_tokens: int
    longest: int
    repeat_time: float
    draws: int
    drawn_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanReport:
    """Packs of an epoch.

    Attributes:
        tokens: int64 [P].
        tiles: int64 [P].
        samples: int64 [P].
        costs: float64 [P].
        max_pack_tokens: the budget of tokens.
        max_pack_tiles: the budget of tiles.
        batches: packs of each step.
        imbalances: by data parallel size, max over mean cost of the ranks in each simulated step.
        random_imbalances: the same for the same packs in random order, assigned in turn.
    """

    tokens: Int64Array
    tiles: Int64Array
    samples: Int64Array
    costs: NDArray[np.float64]
    max_pack_tokens: int
    max_pack_tiles: int
    batches: BatchSchedule
    imbalances: dict[int, Any]
    random_imbalances: dict[int, Any]

    @property
    def step_text(self) -> str:
        """Packs of a step: `32`, or `4 to 32` with a ramp-up."""
        sizes = self.batches.sizes
        return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"

    @property
    def fill(self) -> float:
        """Share of the token budget that is used."""
        return float(self.tokens.sum()) / (self.max_pack_tokens * max(len(self.tokens), 1))

    @property
    def tile_fill(self) -> float:
        """Share of the tile budget that is used."""
        return float(self.tiles.sum()) / (self.max_pack_tiles * max(len(self.tiles), 1))


def describe_datasets(indexes: Sequence[DatasetIndex], plan: MixturePlan | None) -> list[DatasetRow]:
    """One row per data set; without a plan (too much is bad) nothing is drawn."""
    draws = drawn = np.zeros(len(indexes), dtype=np.int64)
    if plan is not None:
        draws, drawn = plan.draws_by_dataset(plan.epoch(0, 0))
    rows = []
    for place, index in enumerate(indexes):
        lengths = np.asarray(index.num_tokens) if len(index) else np.zeros(1, dtype=np.int64)
        rows.append(
            DatasetRow(
                name=index.entry.name,
                samples=len(index),
                bad=len(index.bad),
                parts=int((np.asarray(index.units)[:, 1] > 0).sum()),
                cut=index.num_cut,
                lost=sum(notice.count for notice in index.notices if notice.note.startswith("image:")),
                tokens=int(lengths.sum()),
                supervised=int(np.asarray(index.num_supervised).sum()),
                tiles=int(np.asarray(index.num_tiles).sum()),
                images=int(index.first_image[-1]),
                median_tokens=int(np.median(lengths)),
                p95_tokens=int(np.quantile(lengths, 0.95)),
                longest=int(lengths.max()),
                repeat_time=index.entry.repeat_time,
                draws=int(draws[place]),
                drawn_tokens=int(drawn[place]),
            )
        )
    return rows


def describe_plan(
    plan: MixturePlan, *, max_pack_tokens: int, max_pack_tiles: int, batches: BatchSchedule, balance: bool
) -> PlanReport:
    """Packs of the first epoch, and how evenly their steps load the ranks.

    Data parallel sizes are the powers of two that divide every step, and the largest number that does.
    """
    epoch = plan.epoch(0, 0)
    tokens, tiles, samples = plan.pack_totals(epoch)
    largest = math.gcd(*batches.sizes)
    sizes = sorted({size for size in (2**power for power in range(1, 14)) if largest % size == 0})
    sizes = sizes if largest in sizes or largest == 1 else [*sizes, largest]
    _, step_sizes = whole_steps(batches, 0, epoch.num_packs)
    costs = np.asarray(epoch.costs)
    shuffled = np.random.default_rng(0).permutation(costs)
    return PlanReport(
        tokens=tokens,
        tiles=tiles,
        samples=samples,
        costs=costs,
        max_pack_tokens=max_pack_tokens,
        max_pack_tiles=max_pack_tiles,
        batches=batches,
        imbalances={size: step_imbalances(costs, step_sizes, size, by_cost=balance) for size in sizes},
        random_imbalances={
            size: step_imbalances(shuffled, step_sizes, size, by_cost=False) for size in sizes
        },
    )


def step_imbalances(costs: Any, sizes: Int64Array, dp: int, *, by_cost: bool) -> NDArray[np.float64]:
    """Cost of the slowest rank over the mean, for steps of consecutive packs.

    Args:
        costs: float [P], in order of the steps.
        sizes: int64 [k], packs of each step.
        dp: data parallel ranks.
        by_cost: packs are assigned by cost; false assigns them in turn.
    """
    num_steps, ends = len(sizes), np.cumsum(sizes)
    steps = np.unique(np.linspace(0, num_steps - 1, min(num_steps, _MAX_STEPS)).astype(int))
    found = []
    for step in steps.tolist() if num_steps else []:
        own = costs[ends[step] - sizes[step] : ends[step]].tolist()
        in_turn = [list(range(rank, len(own), dp)) for rank in range(dp)]
        found.append(imbalance(own, assign_packs(own, dp) if by_cost else in_turn))
    return np.array(found)


def notice_lines(indexes: Sequence[DatasetIndex], *, exif: str, alpha: str) -> list[str]:
    """What was not read, read under another name, or lost by rule: one line each, losses first."""
    found = [(index, notice) for index in indexes for notice in index.notices]
    found.sort(key=lambda each: not each[1].is_lost)
    return [
        f"{index.entry.name}: {notice_text(notice, annotation=index.entry.annotation, exif=exif, alpha=alpha)}"
        for index, notice in found
    ]


def data_table(rows: Sequence[DatasetRow], report: PlanReport | None, *, notices: Sequence[str] = ()) -> str:
    """Data sets, their sum, what was noticed, and the packs, as text."""
    header = [
        "data set",
        "samples",
        "bad",
        "cut",
        "parts",
        "tokens",
        "median",
        "p95",
        "longest",
        "supervised",
    ]
    header += ["images", "lost", "tiles", "x", "drawn", "share"]
    total = max(sum(row.drawn_tokens for row in rows), 1)
    text = "\n".join(text_table(header, [_cells(row, total, is_planned=report is not None) for row in rows]))
    draws = (
        f"an epoch draws {sum(row.draws for row in rows):,} samples, "
        f"{sum(row.drawn_tokens for row in rows):,} tokens"
    )
    sums = (
        f"{sum(row.samples for row in rows):,} samples, {sum(row.bad for row in rows):,} bad, "
        f"{sum(row.tokens for row in rows):,} tokens, {sum(row.tiles for row in rows):,} tiles; "
        + (draws if report is not None else "no epoch is planned, the error says why")
    )
    noticed = "".join(f"{line}\n" for line in notices)
    return f"{text}\n\n{sums}\n{noticed}" + (_plan_text(report) if report is not None else "")


def _cells(row: DatasetRow, total: int, *, is_planned: bool) -> list[str]:
    numbers = [row.samples, row.bad, row.cut, row.parts, row.tokens, row.median_tokens, row.p95_tokens]
    numbers += [row.longest, row.supervised, row.images, row.lost, row.tiles]
    shown = [f"{number:,}" for number in numbers]
    drawn = [f"{row.draws:,}", f"{row.drawn_tokens / total:.1%}"] if is_planned else ["-", "-"]
    return [row.name, *shown, f"{row.repeat_time:g}", *drawn]


def _plan_text(report: PlanReport) -> str:
    spread = report.costs.std() / report.costs.mean()
    lines = [
        f"{len(report.tokens):,} packs of {report.max_pack_tokens:,} tokens, {report.fill:.2%} full, and of "
        f"{report.max_pack_tiles:,} tiles, {report.tile_fill:.2%} full; "
        f"{report.samples.mean():.1f} samples each; cost of a pack varies by {spread:.1%} (standard deviation)"
    ]
    if len(report.tokens) < report.batches.full_size:
        lines.append("an epoch is shorter than a step, so steps hold packs of several epochs")
    if report.step_text == "1":
        lines.append(
            "a step has one pack and loads one rank; give the run's optim.global_batch_size=N to see how evenly N "
            "packs load 2, 4, 8, ... ranks"
        )
    lines += [
        f"step of {report.step_text} packs on {size} data parallel ranks: slowest rank {values.mean():.3f} x the mean "
        f"(random order {report.random_imbalances[size].mean():.3f})"
        for size, values in report.imbalances.items()
        if len(values)
    ]
    return "\n".join(lines) + "\n"


def datasets_csv(rows: Sequence[DatasetRow]) -> str:
    """The rows as comma separated values."""
    names = list(DatasetRow.__dataclass_fields__)
    return _csv([names, *([getattr(row, name) for name in names] for row in rows)])


def packs_csv(report: PlanReport) -> str:
    """Every pack of the epoch in order, as comma separated values."""
    columns = (report.tokens, report.tiles, report.samples, report.costs.round().astype(np.int64))
    packs = zip(range(len(report.tokens)), *(column.tolist() for column in columns), strict=True)
    return _csv([["pack", "tokens", "tiles", "samples", "cost"], *packs])


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
