"""The limit of a step's loss: by hand for a few steps, off, and the same after a checkpoint as without one."""

import math

from megatron_v2pe.train.guards.loss_guard import LossGuard
from megatron_v2pe.train.step import StepReport


def report(loss, *, is_applied=True):
    return StepReport(
        is_applied=is_applied,
        loss=loss,
        loss_by_source={},
        weight_by_source={},
        tokens_by_source={},
        grad_norm=1.0,
        lr=1.0,
        part_norms={},
        loss_limit=math.inf,
        bad_packs=(),
        seconds=1.0,
    )


def test_the_limit_is_so_many_times_the_median_of_the_last_applied_steps():
    guard = LossGuard(max_ratio=3.0, window=3)
    limits = []
    for loss, is_applied in (
        (5.0, True),
        (1.0, True),
        (math.nan, False),
        (2.0, True),
        (90.0, False),
        (4.0, True),
    ):
        limits.append(guard.limit)
        guard.after(report(loss, is_applied=is_applied))
    assert limits == [math.inf, math.inf, math.inf, math.inf, 6.0, 6.0]
    assert guard.limit == 6.0  # of 1, 2, 4
    assert guard.after(report(3.0)) == (2.0, 4.0, 3.0)
    assert guard.limit == 9.0


def test_off_it_allows_everything_and_remembers_nothing():
    guard = LossGuard(max_ratio=0.0, window=1, losses=(1.0,))
    assert guard.after(report(2.0)) == ()
    assert guard.limit == math.inf


def test_a_guard_made_from_a_checkpoint_decides_as_the_one_before():
    first = LossGuard(max_ratio=2.0, window=4)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        kept = first.after(report(loss))
    second = LossGuard(max_ratio=2.0, window=4, losses=kept)
    assert second.limit == first.limit == 7.0
    shorter = LossGuard(max_ratio=2.0, window=2, losses=kept)
    assert shorter.limit == 9.0  # the newest ones
