"""Steps whose loss or gradient is not finite, or whose loss is too large: recorded for replay; too many end the run.

    StepReport, not applied --packs of every data parallel rank--> RUN_DIR/bad_steps.jsonl --in a row > limit--> error

Which packs a step draws depends on the seed and the step alone: `megatron-v2pe show-sample RUN.yaml --step N` shows
them again, and a run that is started again draws them again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.core.errors import TrainingError
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.step import StepReport

logger = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"


@dataclass(kw_only=True)
class BadSteps:
    """Counts bad steps in a row. Every rank must call `record` for every step.

    Attributes:
        run_dir: rank 0 appends to `bad_steps.jsonl` in it.
        ranks: this rank's place.
        max_in_row: see `runtime.max_bad_steps`.
        in_row: bad steps since the last good one.
        total: bad steps of this process.
    """

    run_dir: Path
    ranks: Ranks
    max_in_row: int
    in_row: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0

    def record(self, report: StepReport, batches: Sequence[PackedBatch], *, step: int) -> None:
        """Record the step when it was not applied; collective only then.

        Raises:
            TrainingError: on every rank, at the last bad step that `max_in_row` allows.
        """
        if report.is_applied:
            self.in_row.clear()
            return
        line = {
            "step": step,
            "loss": str(report.loss),
            "loss_limit": None if math.isinf(report.loss_limit) else report.loss_limit,
            "grad_norms": {part: str(norm) for part, norm in report.part_norms.items()},
            "lr": report.lr,
            "packs": self._gathered(report, batches),
        }
        self.in_row.append(line)
        self.total += 1
        if self.ranks.rank == 0:
            append_json(self.run_dir / FILE, line)
            logger.warning("step %d is not applied: %s", step, _described(line))
        if len(self.in_row) >= self.max_in_row:
            raise TrainingError(self._message())

    def _gathered(self, report: StepReport, batches: Sequence[PackedBatch]) -> list[dict[str, Any]]:
        """Packs of the global batch, each once, and whether the ranks that computed its loss found it finite."""
        own = (self.ranks.dp_rank, report.bad_packs, [list(batch.sample_ids) for batch in batches])
        gathered: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, own)
        packs = {
            (dp_rank, number): names for dp_rank, _, each in gathered for number, names in enumerate(each)
        }
        bad = {(dp_rank, number) for dp_rank, numbers, _ in gathered for number in numbers}
        return [
            {
                "dp_rank": place[0],
                "micro_batch": place[1],
                "loss_is_finite": place not in bad,
                "samples": names,
            }
            for place, names in sorted(packs.items())
        ]

    def _message(self) -> str:
        steps = ", ".join(str(line["step"]) for line in self.in_row)
        return (
            f"{len(self.in_row)} steps in a row (runtime.max_bad_steps) were not applied, as a loss or gradient was "
            f"not finite or the loss above runtime.max_loss_ratio: {steps}; the last: {_described(self.in_row[-1])}. "
            f"All are in {self.run_dir / FILE}; look at their samples (megatron-v2pe show-sample RUN.yaml --step N), "
            "lower optim.lr, or allow larger losses; "
            "the same command starts again from the newest checkpoint"
        )


def _described(line: dict[str, Any]) -> str:
    """Loss, norms and samples in a few words; first those of packs whose own loss is bad."""
    bad = [pack for pack in line["packs"] if not pack["loss_is_finite"]] or line["packs"]
    names = [name for pack in bad for name in pack["samples"]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    norms = ", ".join(f"{part} {norm}" for part, norm in line["grad_norms"].items())
    limit = line["loss_limit"]
    above = "" if limit is None else f" (allowed up to {limit:.4g} by runtime.max_loss_ratio)"
    return f"loss {line['loss']}{above}, gradient norms {norms}; samples {', '.join(names[:8])}{more}"
