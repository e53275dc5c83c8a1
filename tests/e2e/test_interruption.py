"""A run that is asked to stop keeps what it did: it ends after a step with a checkpoint, and continues to the last bit.

Strategy: real signals to real processes, and the stop file of batch scripts; the losses of both parts together equal
those of a run that nobody disturbed. Strictness: bit-equal, as the layout stays the same.
"""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.support import tiny
from tests.support.warm import run_verb

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Configuration of a longer run without checkpoints of its own but the last, and its curve."""
    root = tmp_path_factory.mktemp("interruption")
    config = tiny.prepared(root, run="whole")
    tiny.train(config, [f"optim.steps={STEPS}"])
    return config, tiny.curve(root / "whole")


def started(config, run_dir, *, ranks=1):
    """A running process whose first step is done."""
    overrides = [f"optim.steps={STEPS}", f"runtime.run_dir={run_dir}"]
    command = tiny.train_command(config, overrides, ranks=ranks)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end, "no first step within 120 s"
        time.sleep(0.01)
    return process


def check_stopped(process, run_dir, *, reason, code):
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr[-3000:]
    record = json.loads((run_dir / "interrupted.json").read_text())
    assert record["reason"] == reason
    assert 1 <= record["step"] < STEPS
    assert len(tiny.curve(run_dir)) == record["step"]
    assert (run_dir / "checkpoints" / f"step_{record['step']:08d}" / "checkpoint.json").exists()
    assert not (run_dir / "stop").exists()


def check_continues(undisturbed, run_dir, *, ranks=1):
    config, wanted = undisturbed
    tiny.train(config, [f"optim.steps={STEPS}", f"runtime.run_dir={run_dir}"], ranks=ranks)
    assert not (run_dir / "interrupted.json").exists()
    return tiny.curve(run_dir), wanted


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(undisturbed, tmp_path, number):
    process = started(undisturbed[0], tmp_path)
    process.send_signal(number)
    check_stopped(process, tmp_path, reason=number.name, code=75)
    if number == signal.SIGUSR1:
        found, wanted = check_continues(undisturbed, tmp_path)
        assert found == wanted


def test_a_request_of_the_start_ends_the_run_before_its_first_step(undisturbed, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    later = time.time() + 3600  # after the process was created
    os.utime(stop, (later, later))
    done = run_verb("train", undisturbed[0], f"runtime.run_dir={tmp_path}")
    assert done.returncode == 75, done.stderr[-3000:]
    assert json.loads((tmp_path / "interrupted.json").read_text()) == {"reason": "stop", "step": 0}
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not stop.exists()


def test_an_old_stop_file_stops_nothing(undisturbed, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    os.utime(stop, (1000, 1000))
    tiny.train(undisturbed[0], ["optim.steps=2", f"runtime.run_dir={tmp_path}"])
    assert len(tiny.curve(tmp_path)) == 2


@pytest.mark.distributed
def test_the_stop_file_ends_all_ranks_after_the_same_step(undisturbed, tmp_path):
    process = started(undisturbed[0], tmp_path, ranks=2)
    (tmp_path / "stop").touch()
    check_stopped(process, tmp_path, reason="stop", code=0)
    found, wanted = check_continues(undisturbed, tmp_path, ranks=2)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)  # two data parallel ranks sum in another order
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
