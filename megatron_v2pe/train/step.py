"""One optimizer update: all micro batches, reduced gradients, clipping, Adam, learning rate.

Loss and gradient norms are sums over the world, so every rank sees the same numbers and takes the same decision: an
update whose loss or gradient is not finite, or whose loss is too large, is left out on all of them. Its packs count as
used and the learning rate moves on; weights, moments and the count of Adam's steps stay as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_v2pe.assembly.grad_norms import clip_gradients, grad_norms
from megatron_v2pe.assembly.optimizer import Trainer
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.by_source import SourceTotals, weights_and_tokens
from megatron_v2pe.train.forward_step import MicroBatchRunner


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; sums are over all ranks, equal on every rank.

    Attributes:
        loss: weighted mean loss of the global batch, before the update.
        grad_norm: global gradient norm before clipping.
        part_norms: the same by part: vision, projector, language; 0 for a frozen one.
        lr: learning rate of the update, by `optim.lr`; a part with another one is in proportion to it.
        is_applied: the weights were updated; False when the loss or a gradient was not finite, or the loss too large.
        loss_limit: largest loss that would have been applied.
        bad_packs: micro batches of this rank whose own loss is not finite; only the last stage knows.
        seconds: wall time of the step, data wait excluded.
        by_source: sums by data set; empty where the runner was not told of any.
    """

    loss: float
    grad_norm: float
    part_norms: dict[str, float]
    lr: float
    is_applied: bool
    loss_limit: float
    bad_packs: tuple[int, ...]
    seconds: float
    by_source: SourceTotals


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
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    runner.reset()
    outputs = run_schedule(trainer.wrapped, runner.forward_step, batches)
    loss, by_source = _mean_losses(outputs, batches, runner=runner, ranks=ranks)
    part_norms = grad_norms(trainer.optimizer, trainer.model_chunks, device=ranks.device)
    grad_norm = math.hypot(*part_norms.values())
    is_applied = math.isfinite(loss) and math.isfinite(grad_norm) and loss <= loss_limit
    lr = trainer.scheduler.get_lr({})
    if is_applied:
        clip_gradients(trainer.optimizer, grad_norm)
        trainer.optimizer.step_with_ready_grads()
    trainer.scheduler.step(increment=1)
    return StepReport(
        loss=loss,
        grad_norm=grad_norm,
        part_norms=part_norms,
        lr=lr,
        is_applied=is_applied,
        loss_limit=loss_limit,
        bad_packs=() if is_applied else _bad_packs(outputs),
        seconds=time.perf_counter() - started,
        by_source=by_source,
    )


def _bad_packs(outputs: list[dict[str, Any]]) -> tuple[int, ...]:
    """Numbers of the micro batches whose loss on this rank is not finite; none where no loss is computed."""
    return tuple(
        number for number, output in enumerate(outputs) if not math.isfinite(float(output["loss_sum"]))
    )


def _mean_losses(
    outputs: list[dict[str, Any]], batches: Sequence[PackedBatch], *, runner: MicroBatchRunner, ranks: Ranks
) -> tuple[float, SourceTotals]:
    """Weighted mean loss over data and context parallel ranks, and its parts by data set, on every rank of the world.

    After `finalize`, `runner.weight_sum` is already the global sum on every rank. Loss sums live on the last
    stage; tp ranks there hold the same ones, so one of them speaks; for whole packs, one of the cp ranks too.
    """
    count = runner.num_sources
    sums = torch.zeros(1 + 3 * count, dtype=torch.float64, device=runner.device)
    if ranks.is_last_stage and ranks.tp_rank == 0:
        for output in outputs:
            sums[0] += output["loss_sum"].double()
            if count:
                sums[1 : 1 + count] += output["source_loss_sums"]
        if count and ranks.cp_rank == 0:
            whole = torch.from_numpy(weights_and_tokens(batches, num_sources=count).ravel())
            sums[1 + count :] = whole.to(runner.device)
    dist.all_reduce(sums)
    sums[0] /= runner.weight_sum
    loss, *rest = sums.tolist()
    totals = SourceTotals(
        loss_sums=tuple(rest[:count]),
        weights=tuple(rest[count : 2 * count]),
        tokens=tuple(int(value) for value in rest[2 * count :]),
    )
    return loss, totals
