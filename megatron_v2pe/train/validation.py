"""Loss of held-out data on the weights that are being trained, by data set and by length, on any layout.

    ValidationPacks --forward only--> sums of weight * loss by group --one sum over the world--> {name: number}

Losses are weighted as in training (`data.loss_reduction`): the mean of a group is its sum of weight * loss over its sum
of weight. Nothing that training depends on changes: no gradient, no generator of random numbers, no data order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.validation import Group, ValidationPacks
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.by_source import weights_and_tokens
from megatron_v2pe.train.forward_step import MicroBatchRunner
from megatron_v2pe.train.reduce import gather_by_name, sum_by_name

_AT_ONCE = 8  # packs of one call of the schedule: more keep a pipeline full, and more pixels in memory


@dataclass(kw_only=True)
class Validation:
    """Validates when it is due.

    Attributes:
        packs: this rank's held-out packs; None where the run has none.
        every: steps between validations.
        last_step: of the run, after which it is always due.
        runner: a runner of its own, which counts groups where training counts data sets.
        ranks: this rank's place.
        pp: pipeline parallel size; as many packs, or a multiple, go through the schedule at once.
        on_progress: called with the next step after each call of the schedule, so that a watchdog knows of it.
    """

    packs: ValidationPacks | None
    every: int
    last_step: int
    runner: MicroBatchRunner
    ranks: Ranks
    pp: int = 1
    on_progress: Callable[[int], None] = lambda step: None

    def after_step(self, step: int, model_chunks: Sequence[Any]) -> dict[str, Any]:
        """Numbers for the line of a step, by their names in metrics.jsonl; empty where none is due. Collective.

        Args:
            step: 1-based, just done.
            model_chunks: this rank's wrapped model chunks; left in training mode.

        Raises:
            DataError: a sample cannot be read; on the ranks that read it.
        """
        if self.packs is None or (step % self.every and step != self.last_step):
            return {}
        started = time.perf_counter()
        for chunk in model_chunks:
            chunk.eval()
        sums, weights = self._sums(self.packs, list(model_chunks), step)
        for chunk in model_chunks:
            chunk.train()
        groups = self.packs.groups
        return {
            "validation_loss": _mean(sums, weights),
            "validation_loss_by_source": means_of_groups(groups, sums, weights, lambda group: group.source),
            "validation_loss_by_length": means_of_groups(
                groups, sums, weights, lambda group: group.length_name
            ),
            "validation_s": time.perf_counter() - started,
        }

    @torch.no_grad()
    def _sums(
        self, packs: ValidationPacks, model_chunks: list[Any], step: int
    ) -> tuple[list[float], list[float]]:
        """Sum of weight * loss and of weight of each group, on every rank."""
        count = len(packs.groups)
        losses = torch.zeros(count, dtype=torch.float64, device=self.runner.device)
        weights = torch.zeros(count, dtype=torch.float64, device=self.runner.device)
        own = iter(packs)
        while batches := list(islice(own, packs_at_once(self.pp))):
            self._add(batches, model_chunks, losses, weights)
            self.on_progress(step + 1)
        sums = sum_by_name({"losses": losses, "weights": weights}, device=self.runner.device)
        return sums["losses"].tolist(), sums["weights"].tolist()

    def _add(
        self,
        batches: list[PackedBatch],
        model_chunks: list[Any],
        losses: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        refuse_damaged(batches, ranks=self.ranks, name="data.validation")
        outputs = run_schedule(model_chunks, self.runner.forward_step, batches, forward_only=True)
        if not self.ranks.is_last_stage or self.ranks.tp_rank != 0:
            return  # tp ranks of the last stage have the same losses, so one of them adds its own
        for output in outputs:
            losses += output["source_loss_sums"]
        if self.ranks.cp_rank == 0:
            whole = torch.from_numpy(weights_and_tokens(batches, num_sources=len(weights))[0])
            weights += whole.to(weights.device)


def packs_at_once(pp: int) -> int:
    """Packs of one call of the schedule: a multiple of the pipeline's length."""
    return -(-_AT_ONCE // pp) * pp


def refuse_damaged(batches: Sequence[PackedBatch], *, ranks: Ranks, name: str) -> None:
    """End the run where a rank cannot read a sample: the number must not change with the state of a disk. Collective.

    Args:
        batches: of this rank.
        ranks: its place.
        name: field of the configuration that names the data.

    Raises:
        DataError: on all ranks; those that met it say what it is.
    """
    own = [message for batch in batches for _, message in batch.damaged]
    found = gather_by_name({"damaged": float(len(own))}, ranks=ranks)["damaged"]
    if any(found):
        rank = next(rank for rank, count in enumerate(found) if count)
        raise DataError(f"{name}: {own[0]}" if own else f"{name}: rank {rank} cannot read a sample")


def _mean(sums: Sequence[float], weights: Sequence[float]) -> float | None:
    """Weighted mean; None where it is not finite."""
    value = math.fsum(sums) / math.fsum(weights)
    return value if math.isfinite(value) else None


def means_of_groups(
    groups: Sequence[Group],
    sums: Sequence[float],
    weights: Sequence[float],
    name_of: Callable[[Group], str],
) -> dict[str, float | None]:
    """Weighted mean of the groups of each name, from sums of weight * value and of weight."""
    names = list(dict.fromkeys(name_of(group) for group in groups))
    found: dict[str, float | None] = {}
    for name in names:
        chosen = [index for index, group in enumerate(groups) if name_of(group) == name and weights[index]]
        if chosen:
            found[name] = _mean([sums[index] for index in chosen], [weights[index] for index in chosen])
    return found
