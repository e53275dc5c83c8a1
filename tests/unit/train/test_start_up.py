"""Phases of a start add up to the time since the process was created, and are told once."""

import json
import logging
import time

import psutil

from megatron_v2pe.train.start_up import FILE, StartUp


def test_phases_add_up_and_the_first_step_is_told_apart_from_the_wait_before_it(tmp_path, caplog):
    start_up = StartUp()
    start_up.done("imports")
    time.sleep(0.02)
    start_up.done("checks")
    start_up.done("model")
    start_up.done("checks")
    time.sleep(0.05)
    with caplog.at_level(logging.INFO):
        start_up.after_step(tmp_path, rank=0, step_seconds=0.03)
        start_up.after_step(tmp_path, rank=0, step_seconds=9.0)
    phases = json.loads((tmp_path / FILE).read_text())["seconds"]
    assert list(phases) == ["imports", "checks", "model", "first batch", "first step"]
    assert abs(sum(phases.values()) - (time.time() - psutil.Process().create_time())) < 0.5
    assert phases["checks"] >= 0.02
    assert phases["first step"] == 0.03
    assert phases["first batch"] >= 0.01
    assert caplog.text.count("start-up took") == 1


def test_other_ranks_say_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        StartUp().after_step(tmp_path, rank=1, step_seconds=0.0)
    assert not caplog.text
    assert not list(tmp_path.iterdir())
