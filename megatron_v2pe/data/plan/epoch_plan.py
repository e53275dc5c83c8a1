"""Which packs a step trains on: a pure function of the data, the settings, the seed and the step number.

    stage (curriculum) -> epoch 0, 1, 2, ... -> repeats drawn, shuffled, packed, packs ordered for steps -> pack g

A step consists of the next packs of its stage, as many as `BatchSchedule` says; the stream continues over epochs and
drops nothing. What a step holds depends on no number of ranks or loader workers, so a run resumes from its step
number; the packs of a step are assigned to the ranks by cost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.config.batch_schedule import BatchSchedule
from megatron_v2pe.config.schema import CurriculumStage, DataConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.index.bad_causes import cause_lines
from megatron_v2pe.data.index.rows import BadSample
from megatron_v2pe.data.plan.balance import assign_packs, order_for_steps, whole_steps
from megatron_v2pe.data.plan.packing import best_fit_packs, pack_fill, release_packs
from megatron_v2pe.data.plan.store import EpochPlan, stored_plan
from megatron_v2pe.data.samples.cost import NO_COST, PackCost
from megatron_v2pe.data.samples.notes import notice_text
from megatron_v2pe.v2pe.layout import Int64Array

logger = logging.getLogger(__name__)
_SHOWN_NOTICES = 20
_EPOCHS_PER_STAGE = 2**32  # keeps epoch numbers of different stages apart
_VERSION = 2  # of the order that this file makes
_PACKERS = {"best_fit": best_fit_packs, "release_greedy": release_packs}


class TooManyBadError(DataError):
    """More samples are bad than `data.max_bad_samples` allows.

    Args:
        summary: how many, and how many may be.
        bad: they.
    """

    def __init__(self, summary: str, bad: Sequence[BadSample]) -> None:
        super().__init__(f"{summary}:\n{shown_bad(bad)}")
        self.summary = summary


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """One draw: data set, row of its index, and how often the sample was drawn before in this epoch."""

    dataset: int
    row: int
    occurrence: int


@dataclass(frozen=True, kw_only=True)
class PlannedPack:
    """Samples that share a pack, in order, and the epoch (unique over the run) they are drawn in."""

    epoch: int
    samples: tuple[PlannedSample, ...]
    cost: float


class MixturePlan:
    """All packs of a run.

    Built identically on every rank. Refuses data of which too much is bad: those lines are never drawn.

    Args:
        indexes: measured data sets.
        data: section of the configuration.
        seed: of the run.
        batches: packs of each step.
        cost: what packs cost.
        cache_dir: where plans are kept for the other ranks of the node; None plans in this process only.

    Attributes:
        facts: everything that decides the order, by a name that a person understands.
        fingerprint: digest of `facts`; a resumed run must find the same one.
        num_bad: lines that are never drawn.
        num_samples: samples that may be drawn.
    """

    def __init__(
        self,
        indexes: Sequence[DatasetIndex],
        *,
        data: DataConfig,
        seed: int,
        batches: BatchSchedule,
        cost: PackCost = NO_COST,
        cache_dir: str | Path | None = None,
    ) -> None:
        self._indexes = tuple(indexes)
        self._data = data
        self._seed = seed
        self._batches = batches
        self._cost = cost
        self._cache_dir = cache_dir
        self._stages = data.curriculum or (CurriculumStage(),)
        self._first_rows = np.concatenate([[0], np.cumsum([len(index) for index in indexes])])
        self._num_tokens = np.concatenate([index.num_tokens for index in indexes]).astype(np.int64)
        self._num_tiles = np.concatenate([index.num_tiles for index in indexes]).astype(np.int64)
        unfit = self._unfit_rows()
        self._is_fit = np.ones(len(self._num_tokens), dtype=bool)
        self._is_fit[[row for row, _ in unfit]] = False
        self.bad = [*(bad for index in indexes for bad in index.bad), *(bad for _, bad in unfit)]
        self.num_bad = len(self.bad)
        self.num_samples = int(self._is_fit.sum())
        self._check_bad()
        self.facts = self._facts()
        self.fingerprint = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self._ends: list[list[int]] = [[] for _ in self._stages]  # packs up to the end of each known epoch
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def packs_of_step(self, step: int) -> list[PlannedPack]:
        """The packs of an optimizer step (0-based)."""
        return [self._pack(*place) for place in self._places(step)]

    def packs_of_rank(self, step: int, *, dp_rank: int, dp: int) -> list[PlannedPack]:
        """The packs of a step that one data parallel rank trains on; `dp` must divide the step."""
        places = self._places(step)
        if not self._data.balance:
            return [self._pack(*place) for place in places[dp_rank::dp]]
        costs = [float(self.epoch(stage, epoch).costs[local]) for stage, epoch, local in places]
        return [self._pack(*places[place]) for place in assign_packs(costs, dp)[dp_rank]]

    def pack_totals(self, plan: EpochPlan) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Tokens, tiles and samples of each pack of an epoch, int64 [P] each."""
        if not plan.num_packs:
            return (np.zeros(0, dtype=np.int64),) * 3
        tokens = np.add.reduceat(self._num_tokens[plan.rows], plan.bounds[:-1])
        tiles = np.add.reduceat(self._num_tiles[plan.rows], plan.bounds[:-1])
        return tokens, tiles, np.diff(plan.bounds)

    def draws_by_dataset(self, plan: EpochPlan) -> tuple[Int64Array, Int64Array]:
        """Draws and drawn tokens of each data set in an epoch, int64 [D] each."""
        dataset = np.searchsorted(self._first_rows, plan.rows, side="right") - 1
        count = len(self._indexes)
        tokens = np.bincount(dataset, weights=self._num_tokens[plan.rows], minlength=count)
        return np.bincount(dataset, minlength=count).astype(np.int64), tokens.astype(np.int64)

    def _places(self, step: int) -> list[tuple[int, int, int]]:
        """Stage, epoch and number within the epoch of each pack of a step."""
        starts = [stage.from_step for stage in self._stages]
        stage = int(np.searchsorted(starts, step, side="right")) - 1
        first = self._batches.packs_before(step) - self._batches.packs_before(starts[stage])
        return [self._place(stage, first + offset) for offset in range(self._batches.size(step))]

    def _place(self, stage: int, number: int) -> tuple[int, int, int]:
        """Pack `number` of a stage, counted over its epochs."""
        ends = self._ends[stage]
        while not ends or ends[-1] <= number:
            self._end(stage, len(ends))
        epoch = int(np.searchsorted(ends, number, side="right"))
        return stage, epoch, number - self._end(stage, epoch - 1)

    def _end(self, stage: int, epoch: int) -> int:
        """Packs of a stage up to the end of an epoch; 0 for the epoch before the first."""
        ends = self._ends[stage]
        while len(ends) <= epoch:
            ends.append((ends[-1] if ends else 0) + self.epoch(stage, len(ends)).num_packs)
        return ends[epoch] if epoch >= 0 else 0

    def _pack(self, stage: int, epoch: int, local: int) -> PlannedPack:
        plan = self.epoch(stage, epoch)
        rows = slice(int(plan.bounds[local]), int(plan.bounds[local + 1]))
        return PlannedPack(
            epoch=stage * _EPOCHS_PER_STAGE + epoch,
            samples=tuple(
                self._planned_sample(row, occurrence)
                for row, occurrence in zip(
                    plan.rows[rows].tolist(), plan.occurrences[rows].tolist(), strict=True
                )
            ),
            cost=float(plan.costs[local]),
        )

    def _planned_sample(self, row: int, occurrence: int) -> PlannedSample:
        dataset = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return PlannedSample(dataset=dataset, row=row - int(self._first_rows[dataset]), occurrence=occurrence)

    def _epoch(self, stage: int, epoch: int) -> EpochPlan:
        """An epoch of a stage; those before it must be known, because steps run on over epochs."""
        first = self._batches.packs_before(self._stages[stage].from_step) + self._end(stage, epoch - 1)
        if self._cache_dir is None:
            return self._plan_epoch(stage, epoch, first)
        name = f"{self.fingerprint}-stage{stage}-epoch{epoch}"
        return stored_plan(self._cache_dir, name, lambda: self._plan_epoch(stage, epoch, first))

    def _plan_epoch(self, stage: int, epoch: int, first: int) -> EpochPlan:
        """Draw, shuffle and pack one epoch of a stage, and order its packs.

        Args:
            stage: of the curriculum.
            epoch: of the stage.
            first: packs of all steps before the epoch's first pack, those of other stages among them.
        """
        data, generator = self._data, np.random.default_rng([self._seed, stage, epoch])
        rows, occurrences = self._draw(stage, generator)
        if data.shuffle:
            order = generator.permutation(len(rows))
            rows, occurrences = rows[order], occurrences[order]
        tokens, tiles = self._num_tokens[rows], self._num_tiles[rows]
        packs = _PACKERS[data.packing](
            tokens, tiles, max_tokens=data.max_pack_tokens, max_tiles=data.max_pack_tiles
        )
        packs.sort(key=lambda pack: pack[0])
        bounds = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
        flat = np.fromiter((place for pack in packs for place in pack), dtype=np.int64, count=bounds[-1])
        costs = np.add.reduceat(self._cost.of_samples(tokens, tiles)[flat], bounds[:-1])
        if logger.isEnabledFor(logging.DEBUG):
            fill = pack_fill(packs, tokens, max_tokens=data.max_pack_tokens)
            logger.debug("stage %d, epoch %d: %d packs, %.2f %% full", stage, epoch, len(packs), 100 * fill)
        if data.shuffle:
            order = self._order(costs, first, generator)
            places = [flat[bounds[pack] : bounds[pack + 1]] for pack in order.tolist()]
            flat, costs = np.concatenate(places), costs[order]
            bounds = np.concatenate([[0], np.cumsum([len(each) for each in places])])
        return EpochPlan(
            rows=rows[flat].astype(np.int32),
            occurrences=occurrences[flat].astype(np.int32),
            bounds=bounds.astype(np.int64),
            costs=costs,
        )

    def _order(self, costs: Any, first: int, generator: np.random.Generator) -> Int64Array:
        if not self._data.balance:
            return generator.permutation(len(costs))
        head, sizes = whole_steps(self._batches, first, len(costs))
        return order_for_steps(costs, head=head, sizes=sizes, generator=generator)

    def _draw(self, stage: int, generator: np.random.Generator) -> tuple[Int64Array, Int64Array]:
        """Rows of an epoch with repeats: whole repeats of all, and a fresh random part for the fraction.

        Returns:
            int64 [m] rows of the mixture and int64 [m] occurrences.
        """
        longest = self._stages[stage].max_sample_tokens or self._data.max_sample_tokens
        rows: list[Int64Array] = []
        occurrences: list[Int64Array] = []
        for dataset, index in enumerate(self._indexes):
            members = np.arange(self._first_rows[dataset], self._first_rows[dataset + 1])
            members = members[self._is_fit[members] & (self._num_tokens[members] <= longest)]
            whole = int(index.entry.repeat_time)
            part = round(len(members) * (index.entry.repeat_time - whole))
            drawn = [members] * whole
            drawn.append(
                np.sort(generator.choice(members, size=part, replace=False)) if part else members[:0]
            )
            rows += drawn
            occurrences += [np.full(len(each), repeat) for repeat, each in enumerate(drawn)]
        if not sum(map(len, rows)):
            raise DataError(
                f"data.meta: no sample of at most {longest} tokens is left to draw (curriculum stage {stage}, "
                f"{self.num_samples} usable samples); raise the stage's max_sample_tokens or repeat_time"
            )
        return np.concatenate(rows).astype(np.int64), np.concatenate(occurrences).astype(np.int64)

    def _unfit_rows(self) -> list[tuple[int, BadSample]]:
        """Samples that fit no pack."""
        data = self._data
        is_unfit = (self._num_tokens > data.max_pack_tokens) | (self._num_tiles > data.max_pack_tiles)
        found: list[tuple[int, BadSample]] = []
        for row in np.flatnonzero(is_unfit).tolist():
            sample = self._planned_sample(row, 0)
            index = self._indexes[sample.dataset]
            line = int(index.line_numbers[sample.row])
            message = (
                f"{index.entry.annotation}:{line}: {self._num_tokens[row]} tokens and {self._num_tiles[row]} "
                f"tiles do not fit a pack of data.max_pack_tokens = {data.max_pack_tokens} and "
                f"data.max_pack_tiles = {data.max_pack_tiles}; raise them, or lower data.max_sample_tokens"
            )
            sample_id = index.sample_id(sample.row)
            found.append(
                (row, BadSample(sample_id=sample_id, line_number=line, message=message, kind="long"))
            )
        return found

    def _check_bad(self) -> None:
        num_records = self.num_bad + self.num_samples
        if not num_records:
            raise DataError("data.meta: the annotation files hold no sample at all")
        long = [bad for bad in self.bad if bad.kind == "long"]
        if long and self._data.long_samples == "refuse":
            raise DataError(
                f"{len(long)} of {num_records} samples are too long, and data.long_samples is refuse; raise the limits "
                f"or set it to split, cut or bad:\n{shown_bad(long)}"
            )
        if not self.num_samples:
            raise TooManyBadError(
                f"all {num_records} samples are bad, and none is left to draw; repair them (data.max_bad_samples "
                "cannot help)",
                self.bad,
            )
        allowed = int(self._data.max_bad_samples * num_records + 1e-9)
        if self.num_bad > allowed:
            enough = math.ceil(1000 * self.num_bad / num_records) / 1000
            raise TooManyBadError(
                f"{self.num_bad} of {num_records} samples are bad, but data.max_bad_samples = "
                f"{self._data.max_bad_samples} allows {allowed}; repair them or raise the limit "
                f"(data.max_bad_samples={enough:g} skips them)",
                self.bad,
            )

    def log_bad(self) -> None:
        """Name the samples that are skipped, once and by cause, and count those that are cut."""
        if self.num_bad:
            logger.warning(
                "%d bad samples are skipped (of %d):\n%s",
                self.num_bad,
                self.num_bad + self.num_samples,
                shown_bad(self.bad),
            )
        num_cut = sum(index.num_cut for index in self._indexes)
        if num_cut:
            logger.warning(
                "%d samples are cut at data.max_sample_tokens = %d (data.long_samples is cut)",
                num_cut,
                self._data.max_sample_tokens,
            )

    def log_notices(self) -> None:
        """Say, once for each data set, what is not read, read under another name, or lost by rule."""
        for index in self._indexes:
            notices = sorted(index.notices, key=lambda notice: not notice.is_lost)
            for notice in notices[:_SHOWN_NOTICES]:
                text = notice_text(
                    notice, annotation=index.entry.annotation, exif=self._data.exif, alpha=self._data.alpha
                )
                logger.log(
                    logging.WARNING if notice.is_lost else logging.INFO, "%s: %s", index.entry.name, text
                )
            if len(notices) > _SHOWN_NOTICES:
                logger.warning(
                    "%s: and %d more; `index-data` lists them",
                    index.entry.name,
                    len(notices) - _SHOWN_NOTICES,
                )

    def _facts(self) -> dict[str, Any]:
        data = self._data
        facts: dict[str, Any] = {
            "order": _VERSION,
            "runtime.seed": self._seed,
            "optim.global_batch_size": self._batches.full_size,
            "cost of a pack (model, vision.freeze)": [
                f"{self._cost.square:.6g}",
                f"{self._cost.tile:.6g}",
            ],
        }
        fields = ("max_pack_tokens", "max_pack_tiles", "max_sample_tokens", "shuffle", "packing", "balance")
        facts |= {f"data.{name}": getattr(data, name) for name in fields}
        if len(self._batches.levels) > 1:
            facts["optim.batch_rampup"] = [[level.from_step, level.size] for level in self._batches.levels]
        facts["data.curriculum"] = [[stage.from_step, stage.max_sample_tokens] for stage in self._stages]
        facts["data sets"] = [index.entry.name for index in self._indexes]
        for index in self._indexes:
            name = f"data set {index.entry.name}"
            bad_lines = hashlib.sha256(json.dumps([bad.line_number for bad in index.bad]).encode())
            facts[f"{name}: content"] = index.content[:16]
            facts[f"{name}: usable samples"] = f"{len(index)}, bad lines {bad_lines.hexdigest()[:8]}"
            facts[f"{name}: repeat_time"] = index.entry.repeat_time
        return facts | self._measuring_facts()

    def _measuring_facts(self) -> dict[str, Any]:
        """What lengths depend on, once where all data sets agree; paths are left out, because data may move."""
        facts: dict[str, Any] = {}
        for key, value in self._indexes[0].settings.items():
            values = [index.settings.get(key) for index in self._indexes]
            if key != "entry" and all(other == value for other in values):
                facts[f"measured with {key}"] = value
            elif key != "entry":
                facts |= {
                    f"data set {index.entry.name}: {key}": other
                    for index, other in zip(self._indexes, values, strict=True)
                }
        return facts


def shown_bad(samples: Sequence[BadSample]) -> str:
    """Bad samples by cause, indented."""
    return "\n".join(f"  {line}" for line in cause_lines(samples))
