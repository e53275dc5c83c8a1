"""The line of a step in the log: short, and right about what is left."""

import logging

import pytest

from tests.support.metric_lines import line_of, log_of


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_fits_a_terminal(said):
    log_of(total_steps=50000).write(line_of(12000))
    (line,) = said()
    assert line == (
        "step 12000/50000  loss 2.1235  grad norm 1.23  lr 5.0e-06  12,346 tokens/s  1.00 s  34.6 GiB  ETA 10:33:20"
    )
    assert len(line) <= 110


def test_lines_come_when_due_and_at_the_last_step(said):
    log = log_of(total_steps=8, log_every=3)
    for step in range(1, 9):
        log.write(line_of(step))
    assert [line.split()[1] for line in said()] == ["3/8", "6/8", "8/8"]


def test_a_wait_for_data_is_named_where_it_is_a_share_of_the_step(said):
    log = log_of(total_steps=9)
    log.write(line_of(1, data_s=0.05, data_s_max=0.1, data_s_max_rank=3))
    log.write(line_of(2, data_s=0.5, data_s_max=0.5))
    log.write(line_of(3, data_s_max=0.75, data_s_max_rank=3))
    first, second, third = said()
    assert " data " not in first
    assert "  data 0.50 s  " in second
    assert "  data 0.75 s (rank 3)  " in third


def test_what_is_not_finite_is_said(said):
    log_of(total_steps=2).write(line_of(1, loss=None, grad_norm=None))
    assert "loss not finite  grad norm not finite" in said()[0]


def test_the_time_left_follows_recent_steps_and_not_the_first(said):
    """The first step of a process is slow; of the others the last twenty count, with their saves."""
    log = log_of(total_steps=1000)
    log.write(line_of(1, step_s=100.0))
    log.write(line_of(2, step_s=1.0))
    for step in range(3, 53):
        log.write(line_of(step, step_s=1.0, data_s=0.5, save_s=0.5))
    lines = said()
    assert lines[0].endswith("ETA 27:45:00")
    assert lines[1].endswith("ETA 0:16:38")
    assert lines[-1].endswith("ETA 0:31:36")  # 948 steps of 2 s
