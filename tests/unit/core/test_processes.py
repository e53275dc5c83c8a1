"""A rank ends when its launcher was killed, also through a shell between them, and not because a shell ended.

The server of loader workers starts early.

Strategy: real processes; a script named torchrun is the launcher, SIGKILL its end.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_v2pe.cli.runs import train
from megatron_v2pe.config.schema import RunConfig

RANK = """
import os, sys, time
from megatron_v2pe.core.processes import end_without_launcher
end_without_launcher()
print(os.getpid(), flush=True)
time.sleep(30)
"""
LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("shell", [[], ["sh", "-c", '"$@"; true', "sh"]])
def test_a_rank_whose_launcher_is_killed_ends(tmp_path, shell):
    script = tmp_path / "torchrun"
    script.write_text(LAUNCHER)
    command = [sys.executable, str(script), *shell, sys.executable, "-c", RANK]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rank = int(launcher.stdout.readline())
    try:
        time.sleep(1.5)
        assert is_alive(rank)
        launcher.kill()
        end = time.monotonic() + 10
        while is_alive(rank) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_alive(rank)
    finally:
        launcher.wait()
        if is_alive(rank):
            os.kill(rank, signal.SIGKILL)


WORKER = """
import sys
from megatron_v2pe.core.processes import start_worker_server, worker_context

def main():
    start_worker_server("wave")
    assert forkserver._forkserver._forkserver_pid
    started = forkserver._forkserver._forkserver_pid
    context = worker_context("wave")
    worker = context.Process(target=check)
    worker.start()
    worker.join()
    assert forkserver._forkserver._forkserver_pid == started, "another server was started"
    assert "wave" not in sys.modules
    print("exit code", worker.exitcode)

def check():
    sys.exit(0 if "wave" in sys.modules else 3)

from multiprocessing import forkserver
if __name__ == "__main__":
    main()
"""


def test_a_server_that_was_started_early_is_the_workers_and_has_imported_for_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKER)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "exit code 0\n", ended.stderr


def test_train_starts_it_before_anything_heavy_is_imported(monkeypatch):
    """Only where there are workers."""
    started = []

    class Stopped(Exception):
        pass

    def stop(*_args, **_kwargs):
        raise Stopped

    config = RunConfig()
    monkeypatch.setattr(train, "start_worker_server", started.append)
    monkeypatch.setattr(train, "prepare_gpu_environment", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("megatron_v2pe.train.monitoring.startup_watch.StartupWatch", stop)
    for workers in (0, 2):
        changed = replace(config, data=replace(config.data, num_workers=workers))
        monkeypatch.setattr(train, "run_config", lambda *_args, changed=changed: changed)
        with pytest.raises(Stopped):
            train.run(Namespace(config="", overrides=[], verify_checkpoint=None))
    assert started == ["megatron_v2pe.data.loader"]
