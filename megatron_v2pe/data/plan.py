"""Which packs a step trains on: a pure function of the data, the settings, the seed and the step number.

    stage (curriculum) -> epoch 0, 1, 2, ... -> repeats drawn, shuffled, packed, packs shuffled -> pack g of the stage

A step takes the next `global_batch_size` packs of its stage, and the stream runs on over epochs without dropping
anything. Nothing depends on the number of ranks or loader workers, so a run resumes from its step number alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_v2pe.config.schema import CurriculumStage, DataConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.logging import get_logger
from megatron_v2pe.data.index import BadSample, DatasetIndex
from megatron_v2pe.data.packing import best_fit_packs, pack_fill
from megatron_v2pe.v2pe.layout import Int64Array

_log = get_logger(__name__)
_SHOWN_BAD = 20
_EPOCHS_PER_STAGE = 2**32  # keeps epoch numbers of different stages apart


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


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """Packs of one epoch: rows of the mixture (all data sets in a row) with their occurrences, and pack bounds."""

    rows: Int64Array
    occurrences: Int64Array
    bounds: Int64Array

    @property
    def num_packs(self) -> int:
        """Packs of the epoch."""
        return len(self.bounds) - 1


class MixturePlan:
    """All packs of a run.

    Built identically on every rank. Refuses data of which too much is bad: those lines are never drawn.

    Attributes:
        fingerprint: digest of everything that decides the order; a resumed run must find the same one.
        num_bad: lines that are never drawn.
        num_samples: lines that may be drawn.
    """

    def __init__(
        self, indexes: Sequence[DatasetIndex], *, data: DataConfig, seed: int, global_batch_size: int
    ) -> None:
        self._indexes, self._data, self._seed = tuple(indexes), data, seed
        self._global_batch_size = global_batch_size
        self._stages = data.curriculum or (CurriculumStage(),)
        self._first_rows = np.concatenate([[0], np.cumsum([len(index) for index in indexes])])
        self._num_tokens = np.concatenate([index.num_tokens for index in indexes])
        self._num_tiles = np.concatenate([index.num_tiles for index in indexes])
        unfit = self._unfit_rows()
        self._is_fit = np.ones(len(self._num_tokens), dtype=bool)
        self._is_fit[[row for row, _ in unfit]] = False
        self.bad = [*(bad for index in indexes for bad in index.bad), *(bad for _, bad in unfit)]
        self.num_bad, self.num_samples = len(self.bad), int(self._is_fit.sum())
        self._check_bad()
        self.fingerprint = self._fingerprint()
        self._ends: list[list[int]] = [[] for _ in self._stages]  # packs up to the end of each known epoch
        self.epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def packs_of_step(self, step: int) -> list[PlannedPack]:
        """The `global_batch_size` packs of an optimizer step (0-based)."""
        starts = [stage.from_step for stage in self._stages]
        stage = int(np.searchsorted(starts, step, side="right")) - 1
        first = (step - starts[stage]) * self._global_batch_size
        return [self._pack(stage, first + offset) for offset in range(self._global_batch_size)]

    def _pack(self, stage: int, number: int) -> PlannedPack:
        """Pack `number` of a stage, counted over its epochs."""
        ends = self._ends[stage]
        while not ends or ends[-1] <= number:
            ends.append((ends[-1] if ends else 0) + self.epoch(stage, len(ends)).num_packs)
        epoch = int(np.searchsorted(ends, number, side="right"))
        plan = self.epoch(stage, epoch)
        local = number - (ends[epoch - 1] if epoch else 0)
        rows = slice(int(plan.bounds[local]), int(plan.bounds[local + 1]))
        return PlannedPack(
            epoch=stage * _EPOCHS_PER_STAGE + epoch,
            samples=tuple(
                self._planned_sample(row, occurrence)
                for row, occurrence in zip(
                    plan.rows[rows].tolist(), plan.occurrences[rows].tolist(), strict=True
                )
            ),
        )

    def _planned_sample(self, row: int, occurrence: int) -> PlannedSample:
        dataset = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return PlannedSample(dataset=dataset, row=row - int(self._first_rows[dataset]), occurrence=occurrence)

    def _plan_epoch(self, stage: int, epoch: int) -> EpochPlan:
        """Draw, shuffle and pack one epoch of a stage."""
        generator = np.random.default_rng([self._seed, stage, epoch])
        rows, occurrences = self._draw(stage, generator)
        if self._data.shuffle:
            order = generator.permutation(len(rows))
            rows, occurrences = rows[order], occurrences[order]
        packs = best_fit_packs(
            self._num_tokens[rows],
            self._num_tiles[rows],
            max_tokens=self._data.max_pack_tokens,
            max_tiles=self._data.max_pack_tiles,
        )
        packs.sort(key=lambda pack: pack[0])
        if self._data.shuffle:
            packs = [packs[place] for place in generator.permutation(len(packs))]
        fill = pack_fill(packs, self._num_tokens[rows], max_tokens=self._data.max_pack_tokens)
        _log.debug("stage %d, epoch %d: %d packs, %.2f %% full", stage, epoch, len(packs), 100 * fill)
        flat = np.array([place for pack in packs for place in pack], dtype=np.int64)
        bounds = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])]).astype(np.int64)
        return EpochPlan(rows=rows[flat], occurrences=occurrences[flat], bounds=bounds)

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
        """Samples that no pack can take."""
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
            bad = BadSample(sample_id=index.sample_id(sample.row), line_number=line, message=message)
            found.append((row, bad))
        return found

    def _check_bad(self) -> None:
        num_records = self.num_bad + self.num_samples
        allowed = int(self._data.max_bad_samples * num_records)
        shown = "\n".join(f"  {bad.message}" for bad in self.bad[:_SHOWN_BAD])
        more = f"\n  ... and {self.num_bad - _SHOWN_BAD} more" if self.num_bad > _SHOWN_BAD else ""
        if not num_records:
            raise DataError("data.meta: the annotation files hold no sample at all")
        if self.num_bad > allowed:
            raise DataError(
                f"{self.num_bad} of {num_records} samples are bad, but data.max_bad_samples = "
                f"{self._data.max_bad_samples} allows {allowed}; repair them or raise the limit:\n{shown}{more}"
            )

    def log_bad(self) -> None:
        """Name the samples that are skipped."""
        if self.num_bad:
            _log.warning("%d bad samples are skipped (of %d)", self.num_bad, self.num_bad + self.num_samples)
        for bad in self.bad[:_SHOWN_BAD]:
            _log.warning("skipped %s: %s", bad.sample_id, bad.message)

    def _fingerprint(self) -> str:
        data = self._data
        facts = [
            [[index.key, len(index), index.entry.repeat_time] for index in self._indexes],
            [data.max_pack_tokens, data.max_pack_tiles, data.max_sample_tokens, data.shuffle],
            [[stage.from_step, stage.max_sample_tokens] for stage in self._stages],
            [self._seed, self._global_batch_size],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
