"""Saves in the background when things go wrong: killed while writing, full disk, asked to stop, no memory for a copy.

Strategy: real processes; the writing thread is slowed down or made to fail from outside, training itself is left alone.
Curves are compared with those of a run that saved nothing on its way. Strictness: bit-equal.
"""

import json
import signal
import subprocess
import sys

import pytest

from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.retention import complete_steps, step_path
from tests.support import tiny

STEPS = 8
SAVES = [f"optim.steps={STEPS}", "checkpoint.save_every=3", "checkpoint.keep=9"]

ALTERED = """
import errno, os, signal, sys, threading, time
from megatron_v2pe.checkpoint.files import block_stream
from megatron_v2pe.checkpoint.state import host_memory
from megatron_v2pe.cli.main import main
from megatron_v2pe.train import loop

what, write, train_step, steps = sys.argv.pop(1), os.pwrite, loop.train_step, []

def counted(*args, **kwargs):
    steps.append(1)
    if what == "killed" and len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "asked to stop" and len(steps) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*args, **kwargs)

def altered(*args):
    if what == "killed" and len(steps) >= 6:
        time.sleep(60)  # the save after step 6 never ends
    if what == "asked to stop":
        time.sleep(0.01)
    if what == "full" and len(steps) >= 6:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(*args)

os.pwrite, loop.train_step = altered, counted
if what == "no memory":
    host_memory.available_bytes = lambda: 1000
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Configuration, and the curve of a run with a checkpoint at its end only."""
    root = tmp_path_factory.mktemp("async_save")
    config = tiny.prepared(root)
    tiny.train(config, [f"optim.steps={STEPS}"])
    return config, tiny.curve(root / "run")


def altered(config, run_dir, what):
    command = [
        sys.executable,
        "-c",
        ALTERED,
        what,
        "train",
        str(config),
        *SAVES,
        f"runtime.run_dir={run_dir}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def check_continues(undisturbed, run_dir, *, at):
    config, wanted = undisturbed
    log = tiny.train(config, [*SAVES, f"runtime.run_dir={run_dir}", "checkpoint.verify=full"])
    assert f"resumed from {step_path(run_dir, at)}" in log
    assert tiny.curve(run_dir) == wanted
    assert not list((run_dir / "checkpoints").glob("*.incomplete"))
    return log


def test_killed_while_a_thread_writes_resumes_from_the_checkpoint_before(undisturbed, tmp_path):
    done = altered(undisturbed[0], tmp_path, "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7  # trained on beside the write
    assert complete_steps(tmp_path) == [3]
    left = step_path(tmp_path, 6).with_name("step_00000006.incomplete")
    assert left.is_dir()
    log = check_continues(undisturbed, tmp_path, at=3)
    assert f"deleted {left}" in log
    assert complete_steps(tmp_path) == [3, 6, 8]


def test_a_write_that_fails_ends_the_run_with_one_message_and_the_old_checkpoint(undisturbed, tmp_path):
    done = altered(undisturbed[0], tmp_path, "full")
    assert done.returncode == 2, done.stderr[-3000:]
    message = done.stderr.splitlines()[-1]
    assert "step_00000006.incomplete" in message
    assert "No space left on device" in message
    assert "Earlier checkpoints are as they were" in message
    assert "Traceback" not in done.stderr
    assert complete_steps(tmp_path) == [3]
    check_continues(undisturbed, tmp_path, at=3)


@pytest.mark.slow
def test_asked_to_stop_while_a_thread_writes_finishes_both_checkpoints(undisturbed, tmp_path):
    done = altered(undisturbed[0], tmp_path, "asked to stop")
    assert done.returncode == 75, done.stderr[-3000:]
    assert json.loads((tmp_path / "interrupted.json").read_text()) == {"reason": "SIGTERM", "step": 5}
    assert "step 5 is to be saved, but the checkpoint of step 3 is still being written" in done.stderr
    assert complete_steps(tmp_path) == [3, 5]
    for step in (3, 5):
        read_info(step_path(tmp_path, step), verify="full")
    check_continues(undisturbed, tmp_path, at=5)


@pytest.mark.slow
def test_without_memory_for_a_copy_the_run_says_so_and_saves_while_it_waits(undisturbed, tmp_path):
    done = altered(undisturbed[0], tmp_path, "no memory")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("training will wait for every save of this run") == 1
    assert "paused" not in done.stderr
    assert complete_steps(tmp_path) == [3, 6, 8]
    assert tiny.curve(tmp_path) == undisturbed[1]
