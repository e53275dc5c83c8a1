"""Faults that torchrun does not mend: it is killed itself, or a rank never arrives. Real ranks, real signals.

Strategy: SIGKILL to torchrun once training is under way; SIGSTOP to a rank as soon as it has its number, which is
before it has imported anything. Strictness: no process is left, the checkpoint is whole, and what waited says for whom.
"""

import contextlib
import os
import re
import signal
import subprocess
import time

import psutil
import pytest

from megatron_v2pe.checkpoint.files.folder import read_info
from tests.support import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
_PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("faults_at_start"))


def started(config, run_dir, *overrides):
    wanted = [f"runtime.run_dir={run_dir}", "parallel.cp=2", *overrides]
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
    return subprocess.Popen(
        tiny.train_command(config, wanted, ranks=2), stderr=subprocess.PIPE, text=True, env=environment
    )


def until(condition, what):
    end = time.monotonic() + _PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {_PATIENCE_S:.0f} s"
        time.sleep(0.02)
    return found


def rank_of(process):
    try:
        return process.environ().get("RANK")
    except psutil.Error:
        return None


def lives(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def child(launcher, rank):
    """The process of a rank, once torchrun has started it."""
    found = (
        each for each in psutil.Process(launcher.pid).children(recursive=True) if rank_of(each) == str(rank)
    )
    return next(found, None)


def test_ranks_whose_torchrun_was_killed_save_and_end(config, tmp_path):
    launcher, ranks = started(config, tmp_path, "optim.steps=100000"), []
    try:
        metrics = tmp_path / "metrics.jsonl"
        until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, "second step")
        ranks = [child(launcher, rank) for rank in (0, 1)]
        launcher.kill()
        launcher.wait()
        until(
            lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks), "end of ranks"
        )
        (folder,) = (tmp_path / "checkpoints").glob("step_????????")
        assert read_info(folder, verify="full").step >= 2
    finally:
        end_all([*psutil.Process().children(recursive=True), *ranks])


def test_a_rank_that_is_stopped_while_it_starts_is_missed_by_the_other(config, tmp_path):
    launcher = started(config, tmp_path, "runtime.hang_timeout_s=120")
    try:
        stopped = until(lambda: child(launcher, 1), "rank 1")
        stopped.send_signal(signal.SIGSTOP)
        _, said = launcher.communicate(timeout=_PATIENCE_S + 120)
        assert launcher.returncode != 0
        assert re.search(r"did not meet the others|start-up makes no progress", said), said[-6000:]
        assert not (tmp_path / "checkpoints").exists()
    finally:
        end_all(psutil.Process().children(recursive=True))
