"""A rank that hangs: its stacks are written and its process ends. Hangs for real, in a process of its own."""

import json
import subprocess
import sys
import time

import pytest

from megatron_v2pe.train.monitoring.watchdog import Watchdog, collective_timeout_minutes

HANGING = """
import ctypes, sys, time
from pathlib import Path
import megatron_v2pe.train.monitoring.watchdog as watchdog
watchdog._GRACE_SECONDS = 0.1
watchdog._TIMER_GRACE_SECONDS = 1.0
def waits_forever():
    {call}
with watchdog.Watchdog(Path(sys.argv[1]), rank=3, world_size=4, timeout_s=0.5, first_step=7):
    waits_forever()
"""
HOLDS_THE_LOCK = "ctypes.PyDLL(None).sleep(60)"  # PyDLL does not release it


@pytest.mark.parametrize("call", ["time.sleep(60)", HOLDS_THE_LOCK])
def test_a_hang_ends_the_process_with_its_stacks(tmp_path, call):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING.format(call=call), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - started < 50
    stacks = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert "waits_forever" in stacks
    if call != HOLDS_THE_LOCK:
        assert "step 7 is not done" in stacks
        assert "it is at waits_forever (<string>:" in done.stderr
        line = json.loads((tmp_path / "stacks" / "rank_3.jsonl").read_text())
        assert (line["rank"], line["world_size"], line["step"], line["is_waiting"]) == (3, 4, 7, False)
        assert line["at"].endswith("in waits_forever")
        assert line["silent"] == []


def test_steps_in_time_leave_a_heartbeat_and_no_stacks(tmp_path):
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_s=2.0, first_step=1) as watchdog:
        for step in range(2, 12):
            time.sleep(0.3)
            watchdog.beat(step)
    assert json.loads((tmp_path / "heartbeats" / "rank_0.json").read_text())["step"] == 1  # once in 10 s
    assert not list((tmp_path / "stacks").iterdir())


def test_stacks_of_an_earlier_hang_are_kept(tmp_path):
    (tmp_path / "stacks").mkdir()
    earlier = tmp_path / "stacks" / "rank_0.txt"
    earlier.write_text("step 5 is not done\n")
    with Watchdog(tmp_path, rank=0, world_size=1, timeout_s=0.0, first_step=6):
        pass
    assert earlier.read_text() == "step 5 is not done\n"


@pytest.mark.parametrize(("seconds", "minutes"), [(0, 1440), (1, 30), (1800, 30), (1801, 31), (7200, 120)])
def test_collectives_wait_as_long_as_a_step(seconds, minutes):
    assert collective_timeout_minutes(seconds) == minutes


def test_ranks_whose_heartbeats_stopped_are_named(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    for rank, age in ((1, 1e5), (2, -1e5)):  # 2 beats on, however slow this machine is
        line = {"step": 6, "time": time.time() - age, "host": "n2"}
        (tmp_path / "heartbeats" / f"rank_{rank}.json").write_text(json.dumps(line))
    subprocess.run(
        [sys.executable, "-c", HANGING.format(call="time.sleep(60)"), str(tmp_path)],
        capture_output=True,
        timeout=50,
        check=False,
    )
    (silent,) = json.loads((tmp_path / "stacks" / "rank_3.jsonl").read_text())["silent"]
    assert (silent["rank"], silent["host"], silent["step"]) == (1, "n2", 6)
