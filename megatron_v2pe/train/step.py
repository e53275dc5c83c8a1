"""One optimizer update: all micro batches, reduced gradients, clipping, Adam, learning rate.

Loss and gradient norms are sums over the world, so every rank sees the same numbers and decides the same: an update
whose loss or gradient is not finite, or whose loss is too large, is skipped on all of them. Its packs count as used
and the learning rate schedule advances; weights, moments and the count of Adam's steps stay as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from megatron_v2pe.assembly.optim.grad_norms import clip_gradients, grad_norms
from megatron_v2pe.assembly.optim.optimizer import Trainer
from megatron_v2pe.assembly.router_counts import take_router_totals
from megatron_v2pe.assembly.schedule import StageRows, run_schedule
from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.by_source import SourceTotals, weights_and_tokens
from megatron_v2pe.train.forward_step import MicroBatchRunner
from megatron_v2pe.train.reduce import sum_by_name

_NOT_METRICS = ("part_norms", "loss_limit", "bad_packs", "seconds", "routers")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; sums are over all ranks, equal on every rank.

    A field is a number of metrics.jsonl of the same name, but for the last five.

    Attributes:
        is_applied: the weights were updated; False when the loss or a gradient was not finite, or the loss too large.
        loss: weighted mean loss of the global batch, before the update.
        loss_by_source: the same by data set; empty where the runner has no names of data sets.
        weight_by_source: share of the loss weight by data set.
        tokens_by_source: tokens by data set, padding excluded.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the update, by `optim.lr`; a part with another one is in proportion to it.
        part_norms: gradient norm by part: vision, projector, language; 0 for a frozen one.
        loss_limit: largest loss that would have been applied.
        bad_packs: micro batches of this rank whose own loss is not finite; only the last stage knows.
        seconds: wall time of the step, data wait excluded.
        routers: numbers of a mixture of experts, see `RouterTotals.numbers`; empty without experts.
    """

    is_applied: bool
    loss: float
    loss_by_source: dict[str, float | None]
    weight_by_source: dict[str, float | None]
    tokens_by_source: dict[str, int]
    grad_norm: float
    lr: float
    part_norms: dict[str, float]
    loss_limit: float
    bad_packs: tuple[int, ...]
    seconds: float
    routers: dict[str, Any] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Its numbers by their names in metrics.jsonl."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NOT_METRICS}
        by_part = {f"grad_norm_{part}": norm for part, norm in self.part_norms.items()}
        return {**own, **by_part, **self.routers}


def train_step(
    trainer: Trainer,
    runner: MicroBatchRunner,
    batches: Sequence[PackedBatch],
    *,
    ranks: Ranks,
    loss_limit: float = math.inf,
) -> StepReport:
    """Run one update over this data parallel rank's micro batches; see `StepReport.is_applied`."""
    started = time.perf_counter()
    for chunk in trainer.wrapped:
        if not chunk.training:  # walks over every module
            chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    runner.reset()
    stages = None
    if runner.rows is not None:
        stages = StageRows(rows=[runner.rows(batch) for batch in batches], groups=ranks.groups)
    outputs = run_schedule(trainer.wrapped, runner.forward_step, batches, stages=stages)
    loss, totals = mean_losses(outputs, batches, runner=runner, ranks=ranks)
    part_norms = grad_norms(trainer.optimizer, trainer.shards, device=ranks.device)
    grad_norm = math.hypot(*part_norms.values())
    is_applied = math.isfinite(loss) and math.isfinite(grad_norm) and loss <= loss_limit
    lr = trainer.scheduler.get_lr({})
    if is_applied:
        clip_gradients(trainer.optimizer, grad_norm)
        trainer.optimizer.step_with_ready_grads()
    trainer.scheduler.step(increment=1)
    routers = take_router_totals(trainer.model_chunks, ranks=ranks)
    if is_applied and routers is not None:
        trainer.expert_bias.update(routers)
    return StepReport(
        is_applied=is_applied,
        loss=loss,
        loss_by_source=totals.losses(runner.source_names),
        weight_by_source=totals.weight_shares(runner.source_names),
        tokens_by_source=totals.token_counts(runner.source_names),
        grad_norm=grad_norm,
        lr=lr,
        part_norms=part_norms,
        loss_limit=loss_limit,
        bad_packs=() if is_applied else _bad_packs(outputs),
        seconds=time.perf_counter() - started,
        routers=routers.numbers(float(runner.weight_sum)) | trainer.expert_bias.numbers() if routers else {},
    )


def _bad_packs(outputs: list[dict[str, Any]]) -> tuple[int, ...]:
    """Numbers of the micro batches whose loss on this rank is not finite; none where no loss is computed."""
    return tuple(
        number for number, output in enumerate(outputs) if not math.isfinite(float(output["loss_sum"]))
    )


def mean_losses(
    outputs: list[dict[str, Any]], batches: Sequence[PackedBatch], *, runner: MicroBatchRunner, ranks: Ranks
) -> tuple[float, SourceTotals]:
    """Weighted mean loss over data and context parallel ranks, and sums by data set, on every rank of the world.

    After `finalize`, `runner.weight_sum` is already the global sum on every rank. Loss sums are on the last stage;
    tp ranks there have the same ones, so one of them adds its own; for whole packs, one of the cp ranks too.
    """
    num_sources = len(runner.source_names)
    loss_sum = torch.zeros((), dtype=torch.float64, device=runner.device)
    source_loss_sums = torch.zeros(num_sources, dtype=torch.float64, device=runner.device)
    source_weights = source_tokens = torch.zeros(num_sources, dtype=torch.float64, device=runner.device)
    if ranks.is_last_stage and ranks.tp_rank == 0:
        for output in outputs:
            loss_sum += output["loss_sum"].double()
            if num_sources:
                source_loss_sums += output["source_loss_sums"]
        if num_sources and ranks.cp_rank == 0:
            (whole,) = to_device([weights_and_tokens(batches, num_sources=num_sources)], runner.device)
            source_weights, source_tokens = whole
    sums = sum_by_name(
        {
            "loss": loss_sum,
            "source_losses": source_loss_sums,
            "source_weights": source_weights,
            "source_tokens": source_tokens,
            # Summed over the world already; it comes to the host with the others.
            "weight": runner.weight_sum * (ranks.rank == 0),
        },
        device=runner.device,
    )
    totals = SourceTotals(
        loss_sums=tuple(sums["source_losses"].tolist()),
        weights=tuple(sums["source_weights"].tolist()),
        tokens=tuple(map(int, sums["source_tokens"].tolist())),
    )
    return float(sums["loss"] / sums["weight"]), totals
