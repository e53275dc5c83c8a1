"""What the table of a mixture says of its steps, of one size and of a batch that grows."""

import numpy as np

from megatron_v2pe.config.batch_schedule import constant_batches, ramped_batches
from megatron_v2pe.data.report import data_table, describe_plan, step_imbalances
from tests.unit.data.plan.test_epoch_plan import LENGTHS, index, plan


def described(batches):
    planned = plan(index(LENGTHS), batches=batches)
    return describe_plan(planned, max_pack_tokens=100, max_pack_tiles=10, batches=batches, balance=True)


def test_steps_of_one_size_on_the_sizes_that_divide_them():
    report = described(constant_batches(12))
    assert report.step_text == "12"
    assert list(report.imbalances) == [2, 4, 12]
    assert len(report.imbalances[2]) == len(report.tokens) // 12
    assert "\nstep of 12 packs on 4 data parallel ranks" in data_table([], report)


def test_growing_steps_on_the_sizes_that_divide_all_of_them():
    report = described(ramped_batches(start=6, increment=6, packs=40, size=18))
    assert report.step_text == "6 to 18"
    assert list(report.imbalances) == [2, 6]
    assert "\nstep of 6 to 18 packs on 6 data parallel ranks" in data_table([], report)


def test_every_step_is_looked_at_with_its_own_size():
    costs = np.array([1.0, 3.0, 1.0, 1.0, 2.0, 4.0])
    found = step_imbalances(costs, np.array([2, 4]), 2, by_cost=False)
    assert found.tolist() == [1.5, 1.25]
