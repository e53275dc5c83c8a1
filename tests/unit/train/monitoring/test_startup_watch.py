"""A start without progress ends with a report and exit code 1; phases that may be long are given longer.

Strategy: processes of their own, which import no torch, with limits of tenths of a second.
"""

import subprocess
import sys
import time

import pytest

from megatron_v2pe.train.monitoring.startup_watch import StartupWatch

PROGRAM = """
import sys, time
from megatron_v2pe.train.monitoring.startup_watch import StartupWatch
assert "torch" not in sys.modules
with StartupWatch({limit}, rank=3) as watch:
    for phase in {phases}:
        watch.done(phase)
    time.sleep({seconds})
print("started")
"""


def started(phases, *, limit=0.4, seconds):
    program = PROGRAM.format(phases=phases, limit=limit, seconds=seconds)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )


def test_a_start_that_hangs_is_ended_and_says_where():
    begin = time.monotonic()
    done = started(["imports"], seconds=120)
    assert done.returncode == 1
    assert "start-up makes no progress" in done.stderr
    assert "since 'imports' was done (limit 0.4 s" in done.stderr
    assert "most recent call first" in done.stderr
    assert time.monotonic() - begin < 90, "ended by the watch, not by its sleep"


@pytest.mark.parametrize(
    ("phases", "limit"),
    [
        (["imports", "process groups", "checks"], 0.3),
        (["imports", "process groups", "checkpoint"], 0.3),
        ([], 0),
    ],
)
def test_loading_and_measuring_may_be_longer_and_0_watches_nothing(phases, limit):
    done = started(phases, limit=limit, seconds=1.2)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


def test_progress_is_no_hang_and_a_stopped_watch_stops():
    with StartupWatch(0.5, rank=0) as watch:
        for _ in range(4):
            time.sleep(0.2)
            watch.done("checks")
        watch.stop()
        time.sleep(0.8)
