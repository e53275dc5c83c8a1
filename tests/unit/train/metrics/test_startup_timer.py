"""Phases of a start add up to the time since the process was created, and are reported once."""

import json
import logging
import time

import psutil

from megatron_v2pe.train.metrics.startup_timer import FILE, StartupTimer


def test_phases_add_up_and_the_first_step_is_set_apart_from_the_wait_before_it(tmp_path, caplog):
    startup = StartupTimer()
    startup.done("imports")
    time.sleep(0.02)
    startup.done("checks")
    startup.done("model")
    startup.done("checks")
    time.sleep(0.05)
    before = time.time()
    with caplog.at_level(logging.INFO):
        startup.after_step(tmp_path, rank=0, step_seconds=0.03)
        after = time.time()
        startup.after_step(tmp_path, rank=0, step_seconds=9.0)
    phases = json.loads((tmp_path / FILE).read_text())["seconds"]
    assert list(phases) == ["imports", "checks", "model", "first batch", "first step"]
    created = psutil.Process().create_time()  # in clock ticks, of 10 ms
    assert before - created - 0.5 < sum(phases.values()) < after - created + 0.5
    assert phases["checks"] >= 0.02
    assert phases["first step"] == 0.03
    assert phases["first batch"] >= 0.01
    assert caplog.text.count("start-up took") == 1


def test_other_ranks_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        StartupTimer().after_step(tmp_path, rank=1, step_seconds=0.0)
    assert not caplog.text
    assert not list(tmp_path.iterdir())
