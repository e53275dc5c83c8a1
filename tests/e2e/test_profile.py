"""Profiles of a run: asked for by configuration, by a file, by a signal; the same steps on every chosen rank."""

import gzip
import json
import os
import signal
import subprocess
import time

import pytest

from tests.support import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    return tiny.prepared(root)


def profiled_steps(run_dir, rank):
    return sorted(
        int(path.name.split(".")[0].split("_")[3]) for path in run_dir.glob(f"profile/rank_{rank}_*.json.gz")
    )


def wait_for(process, condition, what):
    end = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.stderr.read()[-4000:]
        assert time.monotonic() < end, f"no {what} within 150 s"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_running_job_is_profiled_on_request(config, tmp_path):
    overrides = [
        f"runtime.run_dir={tmp_path}",
        "optim.steps=1000",
        "parallel.cp=2",
        "runtime.profile_steps=1",
    ]
    command = tiny.train_command(config, [*overrides, "runtime.profile_ranks=all"], ranks=2)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, (tmp_path / "metrics.jsonl").exists, "first step")
        (tmp_path / "profile_now").touch()
        wait_for(process, lambda: profiled_steps(tmp_path, 0) and profiled_steps(tmp_path, 1), "trace")
        assert not (tmp_path / "profile_now").exists()
        (first,) = profiled_steps(tmp_path, 0)
        assert profiled_steps(tmp_path, 1) == [first]
        os.kill(json.loads((tmp_path / "heartbeats" / "rank_1.json").read_text())["pid"], signal.SIGUSR2)
        wait_for(process, lambda: len(profiled_steps(tmp_path, 0)) == 2, "trace after the signal")
        wait_for(process, lambda: len(profiled_steps(tmp_path, 1)) == 2, "trace after the signal")
        assert profiled_steps(tmp_path, 1) == profiled_steps(tmp_path, 0)
        text = (tmp_path / "profile" / f"rank_1_step_{first}.txt").read_text()
        assert "wait for other ranks" in text
    finally:
        (tmp_path / "stop").touch()
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr[-4000:]


def test_a_profiled_run_computes_what_any_run_does(config, tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    tiny.train(config, ["optim.steps=3", "optim.warmup_steps=1", f"runtime.run_dir={plain}"])
    window = ["runtime.profile_from_step=2", "runtime.profile_steps=1"]
    tiny.train(config, ["optim.steps=3", "optim.warmup_steps=1", f"runtime.run_dir={profiled}", *window])
    assert tiny.curve(profiled) == tiny.curve(plain)
    with gzip.open(profiled / "profile" / "rank_0_step_2.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names
    assert profiled_steps(profiled, 0) == [2]
