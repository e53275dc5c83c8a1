"""A run that NVIDIA's ft_launcher started: its monitors hear of every step, kill a stopped rank, and the run continues.

Strategy: the real launcher and its real monitors on CPU, with our own watchdog off; skipped where nvidia-resiliency-ext
is not installed (it is no dependency). Strictness: losses bit-equal to those of an undisturbed run.
"""

import json
import os
import signal
import subprocess
import time

import pytest

from tests.support import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
pytest.importorskip("nvidia_resiliency_ext", reason="nvidia-resiliency-ext is not installed")
STEPS = 8


@pytest.mark.parametrize(
    "limits",
    [
        ["--ft-rank-heartbeat-timeout=15", "--ft-initial-rank-heartbeat-timeout=120"],
        [
            "--ft-rank-heartbeat-timeout=600",
            "--ft-initial-rank-heartbeat-timeout=600",
            "--ft-rank-section-timeouts=setup:120,step:15",
        ],
    ],
    ids=["heartbeats", "sections"],
)
def test_a_stopped_rank_is_killed_by_its_monitor_and_the_run_continues(tmp_path, limits):
    checkpoint = tiny.import_golden(tmp_path / "checkpoint")
    meta = tiny.make_data(tmp_path / "data")
    config = tiny.run_yaml(
        tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=tmp_path / "whole"
    )
    overrides = [f"optim.steps={STEPS}", "parallel.cp=2"]
    tiny.train(config, overrides, ranks=2)
    run_dir = tmp_path / "stopped"
    overrides += [f"runtime.run_dir={run_dir}", "checkpoint.save_every=2", "runtime.hang_timeout_s=0"]
    command = tiny.train_command(config, overrides, ranks=2)
    command[2] = "nvidia_resiliency_ext.fault_tolerance.launcher"
    command[3:3] = ["--max-restarts=1", *limits]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=file)
    end = time.monotonic() + 150
    while not (run_dir / "checkpoints" / "step_00000002").exists():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.01)
    os.kill(json.loads((run_dir / "heartbeats" / "rank_1.json").read_text())["pid"], signal.SIGSTOP)
    assert process.wait(timeout=200) == 0, log.read_text()[-6000:]
    text = log.read_text()
    assert "ft_launcher's monitors (nvidia-resiliency-ext " in text
    assert "resumed from" in text
    assert tiny.curve(run_dir) == tiny.curve(tmp_path / "whole")
    assert not list(run_dir.glob("stacks/*.txt"))
