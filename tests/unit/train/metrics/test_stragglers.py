"""Whom the others wait for, by numbers, and the line that says so."""

import logging
import math
from dataclasses import MISSING, fields

import pytest

from megatron_v2pe.train.metrics.metrics_log import MetricsLog, StepMetrics
from megatron_v2pe.train.metrics.stragglers import Straggler, find_straggler


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


class Nothing:
    def write(self, values):
        pass


def line(step, straggler, seconds):
    zero = {each.name: 0.0 for each in fields(StepMetrics) if each.default is MISSING}
    return StepMetrics(
        **{**zero, "step": step, "step_s": 1.0, "straggler": straggler, "straggler_s": seconds}
    )


def test_the_heartbeat_names_who_cost_most_since_the_one_before(caplog):
    log = MetricsLog([Nothing()], log_every=3, total_steps=9)
    with caplog.at_level(logging.INFO):
        for step, (rank, seconds) in enumerate([(1, 0.5), (5, 0.75), (5, 0.5), (None, None)] * 2, start=1):
            log.write(line(step, rank, seconds))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("STRAGGLER rank 5: the others waited 1.25 s for it in 2 steps")
    assert second.endswith("STRAGGLER rank 5: the others waited 0.75 s for it in 1 step")
