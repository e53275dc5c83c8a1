"""Ranks that die or hang under torchrun: all start again from the newest checkpoint, or end with a report.

Strategy: SIGKILL and SIGSTOP to one of two real ranks, whose process ids their heartbeats name. Strictness: the losses
of the killed run, all of them, are bit-equal to those of a run that nobody disturbed, as the layout is the same.
"""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.support import tiny

STEPS = 8
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("dead_ranks")
    checkpoint = tiny.import_golden(root / "checkpoint")
    meta = tiny.make_data(root / "data")
    return tiny.run_yaml(root / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=root / "run")


def started(config, run_dir, *, overrides, restarts, steps=STEPS):
    """torchrun over two ranks, in a session of its own."""
    overrides = [f"optim.steps={steps}", f"runtime.run_dir={run_dir}", *overrides]
    command = tiny.train_command(config, overrides, ranks=2)
    command.insert(command.index("--standalone"), f"--max-restarts={restarts}")
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition, what):
    end = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.stderr.read()[-4000:]
        assert time.monotonic() < end, f"no {what} within 150 s"
        time.sleep(0.01)


def process_id(run_dir, rank):
    return json.loads((run_dir / "heartbeats" / f"rank_{rank}.json").read_text())["pid"]


def test_a_killed_rank_is_started_again_with_equal_losses(config, tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    tiny.train(config, [f"optim.steps={STEPS}", f"runtime.run_dir={whole}", "parallel.cp=2"], ranks=2)
    overrides = ["parallel.cp=2", "checkpoint.save_every=2"]
    process = started(config, run_dir, overrides=overrides, restarts=1)
    wait_for(process, (run_dir / "checkpoints" / "step_00000002").exists, "checkpoint")
    os.kill(process_id(run_dir, 1), signal.SIGKILL)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr[-4000:]
    assert "resumed from" in stderr
    assert tiny.curve(run_dir) == tiny.curve(whole)


@pytest.mark.slow
def test_a_hung_rank_ends_the_run_with_the_stacks_of_those_that_wait(config, tmp_path):
    overrides = ["parallel.cp=2", "runtime.hang_timeout_s=15"]
    process = started(config, tmp_path, overrides=overrides, restarts=0, steps=1000)
    wait_for(process, (tmp_path / "metrics.jsonl").exists, "first step")
    stopped = process_id(tmp_path, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_for(process, lambda: _mentions(tmp_path / "stacks" / "rank_0.txt", "is not done"), "stacks")
        time.sleep(0.5)
    finally:
        os.kill(stopped, signal.SIGCONT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1, stderr[-4000:]
    stacks = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert " in steps" in stacks  # the loop; which collective of it waits is a matter of luck
    assert "is not done after" in stderr


def _mentions(path, text):
    return path.exists() and text in path.read_text()
