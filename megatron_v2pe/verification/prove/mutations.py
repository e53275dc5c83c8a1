"""Wrong variants of what makes a layout exact, each of which a comparison with one rank must see.

A mutation replaces one function inside the ranks. It changes nothing on one rank, so that what it breaks is the layout
and not the arithmetic. It is caught when an error is at least `CAUGHT` times its tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.assembly import build
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, FeatureRoute, LocalBatch, PackedBatch
from megatron_v2pe.config.lora import parts_trained_whole
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel import batch_sharder
from megatron_v2pe.parallel.attention.transports.direct import _DirectGradReturn
from megatron_v2pe.parallel.attention.transports.ring import _RingGradReturn
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.feature_router import FeatureRouter
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.shards import ZIGZAG, Sharding, Shards
from megatron_v2pe.train.forward_step import MicroBatchRunner
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout
from megatron_v2pe.v2pe.positions import position_units

CAUGHT = 100.0
"""Times its tolerance that an error must be."""


@contextlib.contextmanager
def labels_shifted_after_the_cut() -> Iterator[None]:
    """Each rank's next token is its target: wrong at the end of every zigzag chunk."""
    right = BatchSharder.shard

    def wrong(self: BatchSharder, batch: PackedBatch, **kwargs: Any) -> LocalBatch:
        late = dataclasses.replace(
            batch, labels=np.roll(batch.labels, 1), loss_weights=np.roll(batch.loss_weights, 1)
        )
        local = right(self, late, **kwargs)
        assert local.labels is not None
        assert local.loss_weights is not None
        labels = local.labels.roll(-1)
        labels[0, -1] = IGNORE_INDEX
        weights = torch.where(labels >= 0, local.loss_weights.roll(-1), 0.0)
        return dataclasses.replace(local, labels=labels, loss_weights=weights, supervised=None)

    with mock.patch.object(BatchSharder, "shard", wrong):
        yield


@contextlib.contextmanager
def zigzag_over_the_whole_row() -> Iterator[None]:
    """The pack is cut as one row, positions and features follow; attention treats the parts as documents."""
    right = Sharding.shards

    def wrong(self: Sharding, cu_seqlens: Int64Array, *, cp: int) -> Shards:
        row = right(ZIGZAG, cu_seqlens[[0, -1]], cp=cp)
        return Shards(row.ranges, tuple(np.diff(cu_seqlens).tolist()), None)

    def units(layout: PackLayout, ranges: Int64Array) -> Int64Array:
        return np.concatenate([position_units(layout)[start:stop] for start, stop in ranges])

    with (
        mock.patch.object(Sharding, "shards", wrong),
        mock.patch.object(batch_sharder, "position_units", units),
    ):
        yield


@contextlib.contextmanager
def _with_positions(units_of: Callable[[BatchSharder, PackedBatch, int], Int64Array]) -> Iterator[None]:
    """Positions of a rank's tokens are `units_of(sharder, pack, number of local tokens)`."""
    right = BatchSharder.shard

    def wrong(self: BatchSharder, batch: PackedBatch, **kwargs: Any) -> LocalBatch:
        local = right(self, batch, **kwargs)
        units = torch.from_numpy(units_of(self, batch, len(local.position_units)))
        units = units.to(local.position_units.device)
        return dataclasses.replace(local, position_units=units, has_fractions=None)

    with mock.patch.object(BatchSharder, "shard", wrong):
        yield


def positions_sliced_contiguously() -> AbstractContextManager[Any]:
    """Rank r gets the r-th slice of the position table, as mcore does for a table of the local length."""

    def units(sharder: BatchSharder, batch: PackedBatch, count: int) -> Int64Array:
        whole = position_units(batch.layout)
        start = min(sharder.context.ranks.cp_rank * len(whole) // sharder.context.plan.cp, len(whole) - count)
        return whole[start : start + count]

    return _with_positions(units)


def positions_of_another_rank() -> AbstractContextManager[Any]:
    """Tokens of one shard, positions of the next."""

    def units(sharder: BatchSharder, batch: PackedBatch, count: int) -> Int64Array:
        cp = sharder.context.plan.cp
        shards = sharder.sharding.shards(batch.layout.cu_seqlens, cp=cp)
        other = shards.ranges[(sharder.context.ranks.cp_rank + 1) % cp]
        return np.resize(position_units(batch.layout, other), count)

    return _with_positions(units)


@contextlib.contextmanager
def keys_get_no_gradients_of_other_ranks() -> Iterator[None]:
    """What other ranks computed of the gradients of a rank's keys and values arrives, and is dropped."""

    def dropping(right: Callable[[Any, Tensor], None]) -> Callable[[Any, Tensor], None]:
        return lambda self, d_own: right(self, d_own.clone())

    with (
        mock.patch.object(_RingGradReturn, "finish", dropping(_RingGradReturn.finish)),
        mock.patch.object(_DirectGradReturn, "finish", dropping(_DirectGradReturn.finish)),
    ):
        yield


@contextlib.contextmanager
def positions_reversed_on_later_stages() -> Iterator[None]:
    """Every stage works out positions for itself; those after the first have them last first."""
    right = BatchSharder.shard

    def wrong(self: BatchSharder, batch: PackedBatch, **kwargs: Any) -> LocalBatch:
        local = right(self, batch, **kwargs)
        if self.context.ranks.is_first_stage:
            return local
        return dataclasses.replace(local, position_units=local.position_units.flip(0))

    with mock.patch.object(BatchSharder, "shard", wrong):
        yield


@contextlib.contextmanager
def router_returns_rows_in_another_order() -> Iterator[None]:
    """The right rows, last first."""
    right = FeatureRouter.__call__

    def wrong(self: FeatureRouter, features: Tensor, route: FeatureRoute) -> Tensor:
        rows = right(self, features, route)
        return rows.flip(0) if self.group.size() > 1 else rows

    with mock.patch.object(FeatureRouter, "__call__", wrong):
        yield


@contextlib.contextmanager
def router_sends_no_gradients_back() -> Iterator[None]:
    """Each rank keeps the gradients of its own tiles' rows on its own tokens and drops the others'."""
    right = FeatureRouter.__call__

    def wrong(self: FeatureRouter, features: Tensor, route: FeatureRoute) -> Tensor:
        rows = right(self, features, route)
        if self.group.size() == 1 or route.kept is not None:
            return rows
        first = sum(route.receive_splits[: self.group.rank()])
        mine = rows.new_zeros(len(rows), 1)
        mine[first : first + route.receive_splits[self.group.rank()]] = 1.0
        return rows * mine + (rows * (1 - mine)).detach()

    with mock.patch.object(FeatureRouter, "__call__", wrong):
        yield


def _with_changed_parameters(change: Callable[[str, Any], None]) -> AbstractContextManager[Any]:
    """Build, then `change` (name, parameter) of every model chunk."""
    right = build.build_model

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model_chunks = right(*args, **kwargs)
        for model_chunk in model_chunks:
            for name, parameter in model_chunk.named_parameters():
                change(name, parameter)
        return model_chunks

    return mock.patch.object(build, "build_model", wrong)


def norms_without_the_mark() -> AbstractContextManager[Any]:
    """Decoder norms see a slice of the tokens under sequence parallelism, but their gradients are not summed."""

    def change(name: str, parameter: Any) -> None:
        if name.startswith("language") and "norm" in name:
            parameter.sequence_parallel = False

    return _with_changed_parameters(change)


def vision_without_the_mark() -> AbstractContextManager[Any]:
    """tp ranks encode different tiles under sequence parallelism, but their gradients are not summed."""

    def change(name: str, parameter: Any) -> None:
        if name.startswith(("vision", "projector")):
            parameter.sequence_parallel = False

    return _with_changed_parameters(change)


def vision_counted_once_per_tp_rank() -> AbstractContextManager[Any]:
    """Vision and projector are marked as tensor parallel: the gradient norm counts each of their copies."""

    def change(name: str, parameter: Any) -> None:
        if name.startswith(("vision", "projector")):
            parameter.tensor_model_parallel = True

    return _with_changed_parameters(change)


def split_weights_counted_on_the_first_tp_rank() -> AbstractContextManager[Any]:
    """Decoder linears are not marked as split: the gradient norm counts tp rank 0's slices only."""

    def change(name: str, parameter: Any) -> None:
        if name.startswith("language"):
            parameter.tensor_model_parallel = False

    return _with_changed_parameters(change)


def experts_summed_over_all_ranks() -> AbstractContextManager[Any]:
    """Experts are not marked as spread: gradients of different experts are added over the ranks that hold them."""

    def change(name: str, parameter: Any) -> None:
        if ".experts." in name:
            parameter.allreduce = True

    return _with_changed_parameters(change)


@contextlib.contextmanager
def divided_by_own_weights() -> Iterator[None]:
    """Weights of the loss are summed on each rank alone, and gradients divided by that."""
    from megatron.core.distributed import finalize_model_grads

    def wrong(self: MicroBatchRunner, model: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
        local = self.weight_sum.clone()
        finalize_model_grads(model, self.weight_sum, **kwargs)
        if not local:  # stages before the last have seen no weights
            return
        for wrapper in model:
            if not wrapper.bucket_groups:  # nothing is trained there
                continue
            ranks = wrapper.bucket_groups[0].intra_distributed_optimizer_instance_group.size()
            wrapper.scale_gradients(float(self.weight_sum / local / ranks))

    with mock.patch.object(MicroBatchRunner, "finalize", wrong):
        yield


@dataclass(frozen=True, kw_only=True)
class ProofFacts:
    """What decides which mutations can show: the layout, what is trained, and the shapes of the packs.

    Attributes:
        plan: sizes of the axes.
        config: the run.
        sharding: how packs are cut.
        layouts: documents of each pack.
    """

    plan: ParallelPlan
    config: RunConfig
    sharding: Sharding
    layouts: Sequence[PackLayout]

    @property
    def cuts_documents(self) -> bool:
        """Some document lies on several context parallel ranks."""
        if self.plan.cp == 1:
            return False
        found = [self.sharding.shards(each.cu_seqlens, cp=self.plan.cp).holders for each in self.layouts]
        return any(holders is None or any(len(ranks) > 1 for ranks in holders) for holders in found)

    @property
    def has_images(self) -> bool:
        """Some document has an image."""
        return any(layout.num_tiles for layout in self.layouts)

    @property
    def trains_images(self) -> bool:
        """Tower or projector have gradients."""
        parts = {*parts_trained_whole(self.config)}
        adapters = self.config.lora.vision_rank or self.config.lora.projector_rank
        return self.has_images and bool(parts & {"vision", "projector"} or adapters)

    @property
    def trains_language(self) -> bool:
        """The decoder's own weights have gradients."""
        return "language" in parts_trained_whole(self.config)


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One wrong variant.

    Attributes:
        variant: makes a context manager, inside of which the ranks are wrong.
        needs: what a layout must have, for people.
        applies: whether it does.
        wrong: quantities that must be wrong (of `steps.compare`).
        right: quantities that it leaves right.
    """

    variant: Callable[[], AbstractContextManager[Any]]
    needs: str
    applies: Callable[[ProofFacts], bool]
    wrong: tuple[str, ...]
    right: tuple[str, ...] = ()


_FROM_LOSS_ON = ("loss", "norm", "gradient", "weight 1")
_GRADIENT = ("gradient", "weight 1")
_NORM = ("norm", "weight 1")


def _has_shards(facts: ProofFacts) -> bool:
    return facts.plan.cp > 1


def _is_routed(facts: ProofFacts) -> bool:
    return facts.plan.tile_ranks > 1 and facts.has_images


def _has_copies(facts: ProofFacts) -> bool:
    plan = facts.plan
    return plan.tp > 1 and plan.vision == "replicated" and facts.trains_images


MUTATIONS = {
    "labels shifted after the cut": Mutation(
        variant=labels_shifted_after_the_cut,
        needs="cp, a document on several ranks",
        applies=lambda facts: facts.cuts_documents,
        wrong=_FROM_LOSS_ON,
    ),
    "zigzag over the whole row": Mutation(
        variant=zigzag_over_the_whole_row,
        needs="cp, several documents in a pack",
        applies=lambda facts: _has_shards(facts) and any(len(each.documents) > 1 for each in facts.layouts),
        wrong=_FROM_LOSS_ON,
    ),
    "positions sliced contiguously": Mutation(
        variant=positions_sliced_contiguously, needs="cp", applies=_has_shards, wrong=_FROM_LOSS_ON
    ),
    "positions of another rank": Mutation(
        variant=positions_of_another_rank, needs="cp", applies=_has_shards, wrong=_FROM_LOSS_ON
    ),
    "keys get no gradients of other ranks": Mutation(
        variant=keys_get_no_gradients_of_other_ranks,
        needs="cp with p2p, a document on several ranks, a decoder that is trained",
        applies=lambda facts: (
            facts.cuts_documents and facts.config.parallel.cp_comm_type == "p2p" and facts.trains_language
        ),
        wrong=_GRADIENT,
    ),
    "positions reversed on later stages": Mutation(
        variant=positions_reversed_on_later_stages,
        needs="pp",
        applies=lambda facts: facts.plan.pp > 1,
        wrong=_FROM_LOSS_ON,
    ),
    "image rows in another order": Mutation(
        variant=router_returns_rows_in_another_order,
        needs="cp or sequence parallelism, images",
        applies=_is_routed,
        wrong=_FROM_LOSS_ON,
    ),
    "no gradients through the router": Mutation(
        variant=router_sends_no_gradients_back,
        needs="cp or sequence parallelism with a tower on every tp rank, images that are trained on",
        applies=lambda facts: (
            _is_routed(facts)
            and facts.trains_images
            and not (facts.plan.sequence_parallel and facts.plan.vision == "tensor")
        ),
        wrong=_GRADIENT,
    ),
    "norms without the mark": Mutation(
        variant=norms_without_the_mark,
        needs="sequence parallelism, the decoder trained",
        applies=lambda facts: facts.plan.sequence_parallel and facts.trains_language,
        wrong=_GRADIENT,
    ),
    "vision without the mark": Mutation(
        variant=vision_without_the_mark,
        needs="sequence parallelism with a tower on every tp rank, images that are trained on",
        applies=lambda facts: _has_copies(facts) and facts.plan.sequence_parallel,
        wrong=_GRADIENT,
    ),
    "vision counted once per tp rank": Mutation(
        variant=vision_counted_once_per_tp_rank,
        needs="tp with a tower on every tp rank, images that are trained on",
        applies=_has_copies,
        wrong=_NORM,
        right=("gradient",),
    ),
    "split weights counted on the first tp rank": Mutation(
        variant=split_weights_counted_on_the_first_tp_rank,
        needs="tp, the decoder trained",
        applies=lambda facts: facts.plan.tp > 1 and facts.trains_language,
        wrong=_NORM,
        right=("gradient",),
    ),
    "gradients of experts summed over all ranks": Mutation(
        variant=experts_summed_over_all_ranks,
        needs="ep, the decoder trained",
        applies=lambda facts: facts.plan.ep > 1 and facts.trains_language,
        wrong=_GRADIENT,
    ),
    "gradients divided by each rank's own weights": Mutation(
        variant=divided_by_own_weights,
        needs="cp or dp",
        applies=lambda facts: facts.plan.cp * facts.plan.dp > 1,
        wrong=_GRADIENT,
    ),
}
