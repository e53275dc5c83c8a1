"""Retrieval on the weights that are being trained: is every token of the expected answer the most probable one?

    ValidationPacks --forward only, no loss--> hidden rows before each token of an answer --head--> most probable token
    --one sum over the cp ranks of a pack--> samples without a wrong token, by data set and length

Teacher-forced, as the release reports its numbers at 1M tokens; so it runs on every layout that training runs on. For a
single token it equals a greedy answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import LocalBatch, PackedBatch
from megatron_v2pe.data.validation import ValidationPacks
from megatron_v2pe.parallel.replica import best_of_vocabulary
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.by_source import source_of_tokens
from megatron_v2pe.train.reduce import sum_by_name
from megatron_v2pe.train.validation import means_of_groups, packs_at_once, refuse_damaged

_ROWS = 256  # whose logits exist at a time


@dataclass(kw_only=True)
class Retrieval:
    """Asks when it is due.

    Attributes:
        packs: this rank's packs of questions with answers; None where the run has none.
        every: steps between two times.
        last_step: of the run, after which it is always due.
        shard: (pack, encodes_tiles) -> this rank's share.
        ranks: this rank's place.
        pp: pipeline parallel size.
        on_progress: called with the next step after each call of the schedule.
    """

    packs: ValidationPacks | None
    every: int
    last_step: int
    shard: Callable[..., LocalBatch]
    ranks: Ranks
    pp: int = 1
    on_progress: Callable[[int], None] = lambda step: None
    _lengths: list[tuple[int, ...]] = field(default_factory=list, init=False)
    _labels: list[Tensor] = field(default_factory=list, init=False)

    def after_step(self, step: int, model_chunks: Sequence[Any]) -> dict[str, Any]:
        """Numbers for the line of a step, by their names in metrics.jsonl; empty where none is due. Collective.

        Args:
            step: 1-based, just done.
            model_chunks: this rank's wrapped model chunks; left in training mode.

        Raises:
            DataError: a sample cannot be read.
        """
        if self.packs is None or (step % self.every and step != self.last_step):
            return {}
        started = time.perf_counter()
        for chunk in model_chunks:
            chunk.eval()
        right, asked = self._counts(self.packs, list(model_chunks), step)
        for chunk in model_chunks:
            chunk.train()
        groups = self.packs.groups
        return {
            "retrieval_accuracy": sum(right) / sum(asked),
            "retrieval_accuracy_by_source": means_of_groups(groups, right, asked, lambda g: g.source),
            "retrieval_accuracy_by_length": means_of_groups(groups, right, asked, lambda g: g.length_name),
            "retrieval_s": time.perf_counter() - started,
        }

    @torch.no_grad()
    def _counts(
        self, packs: ValidationPacks, model_chunks: list[Any], step: int
    ) -> tuple[list[float], list[float]]:
        """Samples answered right, and samples, of each group, on every rank."""
        right = torch.zeros(len(packs.groups), dtype=torch.float64)
        asked = torch.zeros(len(packs.groups), dtype=torch.float64)
        own = iter(packs)
        while batches := list(islice(own, packs_at_once(self.pp))):
            refuse_damaged(batches, ranks=self.ranks, name="data.retrieval")
            self._labels, self._lengths = [], []
            outputs = run_schedule(model_chunks, self._forward, batches, forward_only=True)
            if self.ranks.is_last_stage:
                for pack, hidden, labels, lengths in zip(
                    batches, outputs, self._labels, self._lengths, strict=True
                ):
                    wrong = self._is_wrong(model_chunks[-1], hidden, labels)
                    self._add(pack, lengths, wrong, right, asked)
            self.on_progress(step + 1)
        sums = sum_by_name({"right": right, "asked": asked}, device=self.ranks.device)
        return sums["right"].tolist(), sums["asked"].tolist()

    def _forward(self, batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, None]:
        """A micro batch without loss: the schedule keeps the last stage's hidden states."""
        local = self.shard(next(batches), encodes_tiles=get_attr_wrapped_model(model, "pre_process"))
        if get_attr_wrapped_model(model, "post_process"):
            assert local.labels is not None
            self._labels.append(local.labels)
            self._lengths.append(local.local_lengths)
        return model(replace(local, labels=None, loss_weights=None)), None

    def _is_wrong(self, model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        """Float64 [l]: 1 at each local token whose label is not the most probable next token."""
        language = get_attr_wrapped_model(model, "language")
        labels = labels.squeeze(0)
        supervised = (labels >= 0).nonzero().squeeze(1)
        rows = language.head_ports.gather_hidden(hidden).squeeze(1)[supervised]
        weight, first = language.head_weight(), language.head_ports.vocab_start_index
        known = min(max(language.vocab_size - first, 0), len(weight))
        wrong = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            logits = F.linear(rows[part], weight).float()
            logits[:, known:] = float("-inf")
            best, _, _ = best_of_vocabulary(logits, first_index=first, group=self.ranks.groups.tp)
            wrong[supervised[part]] = (best != labels[supervised[part]]).double()
        return wrong

    def _add(
        self,
        pack: PackedBatch,
        local_lengths: tuple[int, ...],
        wrong: Tensor,
        right: Tensor,
        asked: Tensor,
    ) -> None:
        """Count the samples of a pack; one of the ranks that share it does, with the wrong tokens of all."""
        count = len(pack.sources)
        numbered = replace(pack, sources=tuple(range(count)))
        index = torch.from_numpy(source_of_tokens(numbered, local_lengths)).to(wrong.device)
        totals = torch.zeros(count, dtype=torch.float64, device=wrong.device).index_add_(0, index, wrong)
        totals = sum_by_name({"wrong": totals}, device=wrong.device, group=self.ranks.groups.cp)["wrong"]
        is_repeated = not pack.loss_weights.any()  # a run without loss, where a rank has no pack left
        if self.ranks.tp_rank != 0 or self.ranks.cp_rank != 0 or is_repeated:
            return
        for group, value in zip(pack.sources, totals.tolist(), strict=True):
            right[group] += value == 0
            asked[group] += 1
