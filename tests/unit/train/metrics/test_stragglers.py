"""Whom the others wait for, by numbers, and when that is reported."""

import logging
import math

import pytest

from megatron_v2pe.train.metrics.stragglers import SlowRankFinder, Straggler, find_straggler
from tests.support.metric_lines import line_of, log_of


@pytest.mark.parametrize(
    ("waits", "found"),
    [
        ([0.9, 0.8, 0.1, 0.9], Straggler(rank=2, seconds=pytest.approx(0.8))),
        ([0.5, 0.0], Straggler(rank=1, seconds=0.5)),
        ([0.52, 0.5], None),  # 2 % of a step
        ([0.5], None),
        ([0.5, math.nan], None),  # not measured
    ],
)
def test_the_rank_that_waits_least_is_the_straggler(waits, found):
    assert find_straggler(waits, step_seconds=1.0) == found


def found_in(stragglers, *, seconds=0.25):
    """What a finder reports, as (rank, from_step, to_step); `stragglers` has a rank or None for each step."""
    finder, found = SlowRankFinder(), []
    for step, rank in enumerate(stragglers, start=1):
        if slow := finder.after_step(line_of(step, straggler=rank, straggler_s=rank and seconds)):
            found.append((slow.rank, slow.from_step, slow.to_step))
    return found


MOSTLY_5 = [5, 5, 5, 2, 5, None, 5, 5, 5, 5]


def test_a_rank_that_is_slow_in_three_windows_is_found_once():
    assert found_in(MOSTLY_5 * 2) == []
    assert found_in(MOSTLY_5 * 9) == [(5, 1, 30)]


@pytest.mark.parametrize(
    "stragglers",
    [
        [5, None] * 45,  # every other step: not most of a window
        [5, 2, 7, None, 1] * 18,  # now one rank, now another
        ([5] * 20 + [None] * 10) * 3,  # not in three windows in a row
        ([5] * 10 + [2] * 10) * 4,
        [None] * 90,
    ],
)
def test_what_a_healthy_run_shows_is_not_reported(stragglers):
    assert found_in(stragglers) == []


def test_a_rank_that_costs_little_is_not_reported():
    """0.11 of a step is a straggler's; eight of ten such steps are less than a tenth of the window."""
    assert found_in(MOSTLY_5 * 9, seconds=0.11) == []
    assert found_in(MOSTLY_5 * 9, seconds=0.15) == [(5, 1, 30)]


def test_another_rank_is_found_later_and_unmeasured_steps_are_passed_over():
    unmeasured = line_of(7, straggler=None, straggler_s=None, comm_wait_s_max=None)
    finder = SlowRankFinder()
    steps = [
        line_of(10 * step, straggler=rank, straggler_s=0.5) for step, rank in enumerate([5] * 30 + [2] * 30)
    ]
    found = [slow for step in steps for each in (unmeasured, step) if (slow := finder.after_step(each))]
    assert [(slow.rank, slow.to_step) for slow in found] == [(5, 290), (2, 590)]
    assert found[0].share == pytest.approx(0.5)


def test_the_log_names_a_slow_rank_once(caplog):
    log = log_of(total_steps=90)
    with caplog.at_level(logging.WARNING):
        for step, rank in enumerate(MOSTLY_5 * 9, start=1):
            log.write(line_of(step, straggler=rank, straggler_s=rank and 0.25))
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "STRAGGLER rank 5: in steps 1 to 30 the others waited for it 20 % of"
    )
