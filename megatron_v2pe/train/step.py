"""One optimizer update: all micro batches, reduced gradients, clipping, Adam, learning rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_v2pe.assembly.optimizer import Trainer
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.forward_step import MicroBatchRunner


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; sums are over all ranks, equal on every rank.

    Attributes:
        loss: weighted mean loss of the global batch, before the update.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the update.
        seconds: wall time of the step, data wait excluded.
    """

    loss: float
    grad_norm: float
    lr: float
    seconds: float


def train_step(
    trainer: Trainer, runner: MicroBatchRunner, batches: Sequence[PackedBatch], *, ranks: Ranks
) -> StepReport:
    """Run one update over this data parallel rank's micro batches.

    Raises:
        FloatingPointError: the loss is not finite; the update is not applied.
    """
    started = time.perf_counter()
    for chunk in trainer.wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    runner.reset()
    outputs = run_schedule(trainer.wrapped, runner.forward_step, batches)
    loss = _mean_loss(outputs, runner, ranks)
    if not torch.isfinite(torch.tensor(loss)):
        names = ", ".join(name for batch in batches for name in batch.sample_ids)
        raise FloatingPointError(f"loss is {loss}; the update was not applied. Samples of this rank: {names}")
    lr = trainer.optimizer.param_groups[0]["lr"]
    _success, grad_norm, _zeros = trainer.optimizer.step()
    trainer.scheduler.step(increment=1)
    return StepReport(
        loss=loss, grad_norm=float(grad_norm or 0.0), lr=lr, seconds=time.perf_counter() - started
    )


def _mean_loss(outputs: list[dict[str, Any]], runner: MicroBatchRunner, ranks: Ranks) -> float:
    """Weighted mean loss over data and context parallel ranks, on every rank of the world.

    After `finalize`, `runner.weight_sum` is already the global sum on every rank. Loss sums live on the last
    stage; tp ranks there hold the same ones, so one of them speaks.
    """
    total = torch.zeros((), dtype=torch.float64, device=runner.device)
    if ranks.is_last_stage and ranks.tp_rank == 0:
        for output in outputs:
            total += output["loss_sum"].double()
    dist.all_reduce(total)
    return float(total / runner.weight_sum)
