"""Ranks that die or hang under torchrun: all start again from the newest checkpoint; of hangs with a report.

Strategy: SIGKILL and SIGSTOP to one of two real ranks, whose process ids their heartbeats name; a rank that falls
asleep between forward and update. Strictness: the losses of the disturbed run, all of them, are bit-equal to those of
a run that nobody disturbed, as the layout is the same.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.support import tiny

STEPS = 8
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("dead_ranks")
    return tiny.prepared(root)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    tiny.train(config, [f"optim.steps={STEPS}", f"runtime.run_dir={run_dir}", "parallel.cp=2"], ranks=2)
    return tiny.curve(run_dir)


def started(config, run_dir, *, overrides=(), fault=()):
    """torchrun over two ranks, which it starts again once; a fault is what tests.support.injected takes."""
    overrides = [f"optim.steps={STEPS}", f"runtime.run_dir={run_dir}", "parallel.cp=2", *overrides]
    overrides.append("checkpoint.save_every=2")
    command = tiny.train_command(config, overrides, ranks=2)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    if fault:
        at = command.index("megatron_v2pe")
        command[at : at + 2] = ["tests.support.injected", *fault]
    # Ranks that do not end by themselves have 5 seconds instead of torchrun's 30.
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(process, condition, what):
    end = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.stderr.read()[-4000:]
        assert time.monotonic() < end, f"no {what} within 150 s"
        time.sleep(0.01)


def process_id(run_dir, rank):
    return json.loads((run_dir / "heartbeats" / f"rank_{rank}.json").read_text())["pid"]


def check_continues(process, run_dir, undisturbed):
    """It ends well, from a checkpoint; returns what was logged."""
    _, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr[-4000:]
    assert "resumed from" in stderr
    assert tiny.curve(run_dir) == undisturbed
    return stderr


def check_report(run_dir, pattern):
    """`runs` reports the hang in one line."""
    command = [sys.executable, "-m", "megatron_v2pe", "runs", str(run_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert re.search(rf"^hang at step \d+: {pattern}$", shown, re.M), shown


def test_a_killed_rank_is_started_again_with_equal_losses(config, undisturbed, tmp_path):
    process = started(config, tmp_path)
    wait_for(process, (tmp_path / "checkpoints" / "step_00000002").exists, "checkpoint")
    os.kill(process_id(tmp_path, 1), signal.SIGKILL)
    check_continues(process, tmp_path, undisturbed)


@pytest.mark.slow
def test_a_stopped_rank_is_ended_by_the_watch_of_the_other_one(config, undisturbed, tmp_path):
    process = started(config, tmp_path, overrides=["runtime.hang_timeout_s=20"])
    wait_for(process, (tmp_path / "checkpoints" / "step_00000002").exists, "checkpoint")
    os.kill(process_id(tmp_path, 1), signal.SIGSTOP)
    stderr = check_continues(process, tmp_path, undisturbed)
    assert re.search(r"rank 0 on .*: step \d+ is not done after \d+\.\d s .*; it waits in .* \(", stderr), (
        stderr[-9000:]
    )
    assert re.search(r"last heartbeat of rank 1 on \S+ \(step \d+, \d+ s ago\)", stderr)
    check_report(
        tmp_path,
        r"rank 0 waits in .* \(.*:\d+ in \w+.*\), rank 1 is silent, last heard of in step \d+ on \S+",
    )
    assert " in steps" in (tmp_path / "stacks" / "rank_0.txt").read_text()  # the loop


@pytest.mark.slow
def test_a_rank_that_falls_asleep_is_named_as_the_one_that_the_other_waits_for(config, undisturbed, tmp_path):
    fault = ["hang", "1", "5"]
    process = started(config, tmp_path, overrides=["runtime.hang_timeout_s=15"], fault=fault)
    check_continues(process, tmp_path, undisturbed)
    asleep = (
        r"rank 1 is elsewhere, at time\.sleep\(1000\) \(tests/support/injected\.py:\d+ in fall_asleep.*\)"
    )
    check_report(tmp_path, rf"rank 0 waits in all_reduce \(.*step\.py:\d+ in _mean_loss\w*\), {asleep}")
