"""What mcore's pipeline schedule calls for each micro batch: cut, run this stage, add the weights up.

    PackedBatch --BatchSharder--> LocalBatch --InternVL--> weighted sum of the losses   (last stage)

The schedule does not see the weights: it counts in int32. The float weights are summed here, and gradients divided by
their global sum once, after mcore's gradient finalisation (`finalize`), instead of by the schedule's count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_v2pe.batch.packed_batch import LocalBatch, PackedBatch
from megatron_v2pe.train.by_source import local_loss_sums

LossFunction = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(kw_only=True)
class MicroBatchRunner:
    """One optimizer step's view of the micro batches.

    Attributes:
        shard: (pack, encodes_tiles) -> this rank's share; `BatchSharder.shard`.
        device: where the weight sum is kept.
        rows: rows of a pack between this rank's layers, `BatchSharder.rows`; None has stages send them.
        source_names: data sets in the order of `PackedBatch.sources`, whose losses are also added up one by one
            (`by_source`); empty adds up the loss of all only.
        weight_sum: float64 [], loss weights seen by this rank's last stage since `reset`.
    """

    shard: Callable[..., LocalBatch]
    device: torch.device
    rows: Callable[[PackedBatch], int] | None = None
    source_names: tuple[str, ...] = ()
    weight_sum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self.weight_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    def forward_step(self, batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, LossFunction | None]:
        """Run one micro batch through this stage; mcore calls the returned function on the last one.

        A batch without loss weights has no loss function, and the schedule keeps the stage's output itself.
        """
        encodes_tiles = get_attr_wrapped_model(model, "pre_process")
        pack = next(batches)
        batch = self.shard(pack, encodes_tiles=encodes_tiles)
        if batch.loss_weights is None:
            return model(batch), None
        return model(batch), partial(self._loss, pack, batch)

    def _loss(
        self, pack: PackedBatch, batch: LocalBatch, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, losses = output
        loss_weights = batch.loss_weights
        assert loss_weights is not None
        self.weight_sum += loss_weights.sum(dtype=torch.float64)
        report = {"loss_sum": total.detach(), "losses": losses}
        if self.source_names:
            report["source_loss_sums"] = local_loss_sums(
                pack,
                losses,
                loss_weights,
                local_lengths=batch.local_lengths,
                num_sources=len(self.source_names),
            )
        # The schedule's own count is ignored by `finalize`; it must be an int32 tensor.
        return total, torch.zeros((), dtype=torch.int, device=losses.device), report

    def finalize(self, model: list[Any], _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Reduce gradients over all ranks, then divide them by the global weight sum, which only the last stage knows.

        mcore would divide as well, but sums the weights over groups of one rank, too, and waits for a GPU to compare
        them with zero.
        """
        groups = kwargs["pg_collection"]
        if groups.tp.size() == groups.pp.size() == 1:
            # All that mcore would do: what else it looks for, through all modules, lies on other tp or pp ranks.
            for model_chunk in model:
                model_chunk.finish_grad_sync()
        else:
            finalize_model_grads(model, None, **kwargs)
        if groups.pp.size() > 1:
            last_stage = dist.get_process_group_ranks(groups.pp)[-1]
            dist.broadcast(self.weight_sum, src=last_stage, group=groups.pp)
        if groups.dp_cp.size() > 1:
            dist.all_reduce(self.weight_sum, group=groups.dp_cp)
        # A step without any label has gradients of zero, and its loss is not a number.
        scale = 1.0 / torch.where(self.weight_sum > 0, self.weight_sum, torch.ones_like(self.weight_sum))
        for model_chunk in model:
            model_chunk.scale_gradients(scale)


def attach(runner: MicroBatchRunner, wrapped: list[Any]) -> None:
    """Let mcore's schedules call `runner.finalize` after the last backward."""
    for model_chunk in wrapped:
        config = get_attr_wrapped_model(model_chunk, "config")
        config.finalize_model_grads_func = runner.finalize
