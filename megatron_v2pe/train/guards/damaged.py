"""Samples that turn out damaged only when they are drawn: one rank knows, all ranks act alike.

    worker: black tiles, `PackedBatch.damaged`  --one small sum over the world each step-->  zero: nothing to do
                                                --identities, only then------------------->  no loss on them, anywhere

An image that cannot be decoded leaves the pack its tokens and tiles; a line that can no longer be read leaves it only
the lengths that were planned, and all ranks that share the pack then lay the sample out as blank. Either way shapes and
routes are what every rank expects; without labels and weights the sample adds nothing to the loss or to any gradient,
as if it had not been drawn. All ranks see the same list, count the same and stop together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.batch.packed_batch import PackedBatch, blanked, without_loss
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A document without pixels or text: where it is in the global batch, its name, and the reason."""

    dp_rank: int
    micro_batch: int
    document: int
    is_blank: bool
    sample_id: str
    message: str


@dataclass(kw_only=True)
class DamagedSamples:
    """Removes damaged samples from the loss, and counts them.

    Every rank must call `mask_damaged` for every step: it is a collective.

    Attributes:
        run_dir: rank 0 appends to `bad_samples.jsonl` in it.
        ranks: this rank's place.
        num_bad: samples that were found bad before training.
        num_samples: samples that may be drawn.
        max_share: see `data.max_bad_samples`.
        sample_ids: damaged samples that were met, each counted once.
    """

    run_dir: Path
    ranks: Ranks
    num_bad: int
    num_samples: int
    max_share: float
    sample_ids: set[str] = field(default_factory=set)

    @property
    def num_skipped(self) -> int:
        """Samples that do not train, found before or now."""
        return self.num_bad + len(self.sample_ids)

    def mask_damaged(self, batches: Sequence[PackedBatch], *, step: int) -> Sequence[PackedBatch]:
        """This rank's packs, with no loss on documents that any rank found damaged.

        Raises:
            DataError: on every rank, when more are bad than allowed or nothing of the step is left.
        """
        own = [
            Damage(
                dp_rank=self.ranks.dp_rank,
                micro_batch=number,
                document=document,
                is_blank=document in batch.blank,
                sample_id=batch.sample_ids[document],
                message=message,
            )
            for number, batch in enumerate(batches)
            for document, message in batch.damaged
        ]
        if not self._sum(len(own)):
            return batches
        gathered: list[list[Damage]] = [[] for _ in range(self.ranks.world_size)]
        dist.all_gather_object(gathered, own)
        found = [damage for each in gathered for damage in each]
        self._record(found, step)
        batches = [self._masked(batch, number, found) for number, batch in enumerate(batches)]
        if not self._sum(sum(float(batch.loss_weights.sum()) for batch in batches)):
            raise DataError(
                f"step {step}: no sample is left; every one is damaged, the first: {found[0].message}"
            )
        return batches

    def _masked(self, batch: PackedBatch, number: int, found: Sequence[Damage]) -> PackedBatch:
        """Micro batch `number` of this rank, masked as on all ranks that share it."""
        own = [each for each in found if (each.dp_rank, each.micro_batch) == (self.ranks.dp_rank, number)]
        batch = without_loss(batch, {each.document for each in own})
        return blanked(batch, {each.document for each in own if each.is_blank})

    def _sum(self, value: float) -> float:
        (total,) = to_device([np.array([value], dtype=np.float64)], self.ranks.device)
        dist.all_reduce(total)
        return float(total)

    def _record(self, found: Sequence[Damage], step: int) -> None:
        """Record new ones, and stop when they are too many."""
        new = {each.sample_id: each.message for each in found if each.sample_id not in self.sample_ids}
        self.sample_ids.update(new)
        if self.ranks.rank == 0:
            for sample_id, message in new.items():
                logger.warning("step %d: no loss on %s: %s", step, sample_id, message)
                line: dict[str, Any] = {"step": step, "sample": sample_id, "message": message}
                append_json(self.run_dir / "bad_samples.jsonl", line)
        total = self.num_bad + self.num_samples
        allowed = int(self.max_share * total)
        if self.num_skipped > allowed:
            raise DataError(
                f"{self.num_skipped} of {total} samples are bad, {len(self.sample_ids)} of them found while training, "
                f"but data.max_bad_samples = {self.max_share} allows {allowed}; repair them or raise the limit. The "
                f"last: {found[-1].sample_id}: {found[-1].message}"
            )
