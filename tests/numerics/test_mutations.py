"""Wrong variants of what makes a layout exact: the comparison of the parity matrix must see every one of them.

Each variant replaces one function inside the ranks. It is right on one rank (checked too), so that what fails is the
layout and not the arithmetic. The error must be at least 100 times the tolerance.
"""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from tests.numerics.layouts import of
from tests.numerics.test_parity_matrix import TOLERANCES
from tests.support import parity, parity_cases
from tests.support.parity import Work

CASE = parity_cases.Case("packed", "spread", "v2pe_random")


@contextlib.contextmanager
def labels_shifted_after_the_cut():
    """Each rank's next token is its target: wrong at the end of every zigzag chunk."""
    from megatron_v2pe.parallel.batch_sharder import BatchSharder

    right = BatchSharder.shard

    def wrong(self, batch, **kwargs):
        late = dataclasses.replace(
            batch, labels=np.roll(batch.labels, 1), loss_weights=np.roll(batch.loss_weights, 1)
        )
        local = right(self, late, **kwargs)
        labels = local.labels.roll(-1)
        labels[0, -1] = IGNORE_INDEX
        weights = torch.where(labels >= 0, local.loss_weights.roll(-1), 0.0)
        return dataclasses.replace(local, labels=labels, loss_weights=weights, supervised=None)

    with mock.patch.object(BatchSharder, "shard", wrong):
        yield


@contextlib.contextmanager
def zigzag_over_the_whole_row():
    """The pack is cut as one row, positions and features follow; attention treats the parts as documents."""
    from megatron_v2pe.parallel import batch_sharder, zigzag
    from megatron_v2pe.v2pe.positions import position_units

    def ranges(cu_seqlens, *, cp):
        return zigzag.shard_ranges_of_ranks(cu_seqlens[[0, -1]], cp=cp)

    def units(layout, ranges):
        return np.concatenate([position_units(layout)[start:stop] for start, stop in ranges])

    with mock.patch.multiple(batch_sharder, shard_ranges_of_ranks=ranges, position_units=units):
        yield


@contextlib.contextmanager
def positions_sliced_contiguously():
    """Rank r gets the r-th slice of the position table, as mcore does for a table of the local length."""
    from megatron_v2pe.parallel import batch_sharder
    from megatron_v2pe.v2pe.positions import position_units

    def units(layout, ranges):
        count = int((ranges[:, 1] - ranges[:, 0]).sum())
        rank = rank_of(ranges)
        return position_units(layout)[rank * count : (rank + 1) * count]

    with mock.patch.object(batch_sharder, "position_units", units):
        yield


def rank_of(ranges):
    """The context parallel rank that holds these ranges: its first range starts that many zigzag chunks in."""
    zigzag_chunk = int(ranges[0, 1] - ranges[0, 0])
    return int(ranges[0, 0]) // zigzag_chunk


@contextlib.contextmanager
def positions_of_another_rank():
    """Tokens of one shard, positions of the next."""
    from megatron_v2pe.parallel import batch_sharder, zigzag
    from megatron_v2pe.v2pe.positions import position_units

    def units(layout, ranges):
        cp = layout.num_tokens // int((ranges[:, 1] - ranges[:, 0]).sum())
        others = zigzag.shard_ranges(layout.cu_seqlens, cp=cp, cp_rank=(rank_of(ranges) + 1) % cp)
        return position_units(layout, others)

    with mock.patch.object(batch_sharder, "position_units", units):
        yield


@contextlib.contextmanager
def router_returns_rows_in_another_order():
    """The right rows, last first."""
    from megatron_v2pe.parallel.feature_router import FeatureRouter

    right = FeatureRouter.__call__

    def wrong(self, features, route):
        rows = right(self, features, route)
        return rows.flip(0) if self.group.size() > 1 else rows

    with mock.patch.object(FeatureRouter, "__call__", wrong):
        yield


@contextlib.contextmanager
def router_sends_no_gradients_back():
    """Each rank keeps the gradients of its own tiles' rows on its own tokens and drops the others'."""
    from megatron_v2pe.parallel.feature_router import FeatureRouter

    right = FeatureRouter.__call__

    def wrong(self, features, route):
        rows = right(self, features, route)
        if self.group.size() == 1:
            return rows
        first = sum(route.receive_splits[: self.group.rank()])
        mine = torch.zeros(len(rows), 1)
        mine[first : first + route.receive_splits[self.group.rank()]] = 1.0
        return rows * mine + (rows * (1 - mine)).detach()

    with mock.patch.object(FeatureRouter, "__call__", wrong):
        yield


def with_changed_parameters(change):
    """Build, then `change` (name, parameter) of every model chunk."""
    from megatron_v2pe.assembly import build

    right = build.build_model

    def wrong(*args, **kwargs):
        model_chunks = right(*args, **kwargs)
        for model_chunk in model_chunks:
            for name, parameter in model_chunk.named_parameters():
                change(name, parameter)
        return model_chunks

    return mock.patch.object(build, "build_model", wrong)


@contextlib.contextmanager
def norms_without_the_mark():
    """Decoder norms see a slice of the tokens under sequence parallelism, but their gradients are not summed."""

    def change(name, parameter):
        if name.startswith("language") and "norm" in name:
            parameter.sequence_parallel = False

    with with_changed_parameters(change):
        yield


@contextlib.contextmanager
def vision_without_the_mark():
    """tp ranks encode different tiles under sequence parallelism, but their gradients are not summed."""

    def change(name, parameter):
        if name.startswith(("vision", "projector")):
            parameter.sequence_parallel = False

    with with_changed_parameters(change):
        yield


@contextlib.contextmanager
def vision_counted_once_per_tp_rank():
    """Vision and projector are marked as tensor parallel: the gradient norm counts each of their copies."""

    def change(name, parameter):
        if name.startswith(("vision", "projector")):
            parameter.tensor_model_parallel = True

    with with_changed_parameters(change):
        yield


@contextlib.contextmanager
def split_weights_counted_on_the_first_tp_rank():
    """Decoder linears are not marked as split: the gradient norm counts tp rank 0's slices only."""

    def change(name, parameter):
        if name.startswith("language"):
            parameter.tensor_model_parallel = False

    with with_changed_parameters(change):
        yield


@contextlib.contextmanager
def divided_by_own_weights():
    """Weights of the loss are summed on each rank alone, and gradients divided by that."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_v2pe.train.forward_step import MicroBatchRunner

    def wrong(self, model, _num_tokens=None, **kwargs):
        import torch.distributed as dist

        local = self.weight_sum.clone()
        finalize_model_grads(model, self.weight_sum, **kwargs)
        for wrapper in model:
            wrapper.scale_gradients(float(self.weight_sum / local / dist.get_world_size()))

    with mock.patch.object(MicroBatchRunner, "finalize", wrong):
        yield


# name: (variant, layout, quantities that must be wrong, quantities that it leaves right)
CP2, TP2, TP2SP, DP2 = of(cp=2), of(tp=2), of(tp=2, sp=True), of()
FROM_LOSS_ON = ("loss", "norm", "gradient", "weight 1")
VARIANTS = {
    "labels shifted after the cut": (labels_shifted_after_the_cut, CP2, FROM_LOSS_ON, ()),
    "zigzag over the whole row": (zigzag_over_the_whole_row, CP2, FROM_LOSS_ON, ()),
    "positions sliced contiguously": (positions_sliced_contiguously, CP2, FROM_LOSS_ON, ()),
    "positions of another rank": (positions_of_another_rank, CP2, FROM_LOSS_ON, ()),
    "rows in another order, cp": (router_returns_rows_in_another_order, CP2, FROM_LOSS_ON, ()),
    "rows in another order, sp": (router_returns_rows_in_another_order, TP2SP, FROM_LOSS_ON, ()),
    "no gradients through the router": (router_sends_no_gradients_back, CP2, ("gradient", "weight 1"), ()),
    "norms without the mark": (norms_without_the_mark, TP2SP, ("gradient", "weight 1"), ()),
    "vision without the mark": (vision_without_the_mark, TP2SP, ("gradient", "weight 1"), ()),
    "vision counted once per tp rank": (
        vision_counted_once_per_tp_rank,
        TP2,
        ("norm", "weight 1"),
        ("gradient",),
    ),
    "split weights counted on the first tp rank": (
        split_weights_counted_on_the_first_tp_rank,
        TP2,
        ("norm", "weight 1"),
        ("gradient",),
    ),
    "gradients divided by each rank's own weights": (
        divided_by_own_weights,
        DP2,
        ("gradient", "weight 1"),
        (),
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return parity.reference_file(tmp_path_factory.mktemp("reference"), [(CASE, parity.Options())])


@pytest.fixture(scope="module")
def found(reference):
    """Errors of every variant; all run in the same two processes."""
    work = [Work(name, layout, (CASE,), variant) for name, (variant, layout, _, _) in VARIANTS.items()]
    return parity.compare_ranks(2, work, reference, timeout=280)


@pytest.mark.distributed
@pytest.mark.parametrize("name", VARIANTS)
def test_a_wrong_variant_is_seen(found, name):
    _, _, wrong, right = VARIANTS[name]
    errors = {quantity: error for quantity, (error, _) in found[name, str(CASE)].items()}
    for quantity in wrong:
        assert errors[quantity] > 100 * TOLERANCES[quantity], errors
    for quantity in right:
        assert errors[quantity] <= TOLERANCES[quantity], errors


def test_the_variants_are_right_on_one_rank(reference):
    work = [Work(name, of(), (CASE,), variant) for name, (variant, _, _, _) in VARIANTS.items()]
    found = parity.compare_ranks(1, work, reference, timeout=280)
    for name, errors in found.items():
        assert all(errors[quantity][0] <= TOLERANCES[quantity] for quantity in errors), (name, errors)
