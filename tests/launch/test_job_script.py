"""The batch script itself, with stand-ins for squeue, srun and scontrol: whom it lets in, what it asks for.

Strategy: each stand-in writes down its call, and a case says what it answers. The real ones are in tests/slurm.
"""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTS = "case $2 in hostnames) echo n1;; node) echo 'NodeAddr=127.0.0.1 x';; *) echo \"$@\" >>calls;; esac"
QUICK = "exec /bin/sleep 0.2"  # the script's own pauses are of seconds
TOOLS = {"scontrol": HOSTS, "srun": "echo srun >>calls", "squeue": "exit 0", "sleep": QUICK}
INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


class Job:
    """A job script in a folder of its own; `run` is its run folder."""

    def __init__(self, folder, *, more=""):
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        (folder / "cluster.yaml").write_text(f"partition: cpu\nranks_per_node: 1\ngpus_per_node: 0\n{more}")
        (folder / "run.yaml").write_text(f"runtime: {{run_dir: {self.run}}}\n")
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), "cluster.yaml", "--dry-run"]
        done = subprocess.run(
            [*command, "train", "run.yaml"], cwd=folder, capture_output=True, text=True, check=True
        )
        (folder / "job.sbatch").write_text(done.stdout)

    def start(self, number=7, *, restarts=0, **tools):
        """A running script; `tools` replace what stand-ins do."""
        tools = {**TOOLS, **tools}
        place = self.folder / f"bin{number}"
        place.mkdir(exist_ok=True)
        for name, body in tools.items():
            (place / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (place / name).chmod(stat.S_IRWXU)
        environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": str(number)}
        environment |= {
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, number=7, *, restarts=0, **tools):
        """Exit code and log of a script."""
        process = self.start(number, restarts=restarts, **tools)
        log, _ = process.communicate(timeout=30)
        return process.returncode, log

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    @property
    def lock(self):
        return self.run / "job.lock"


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.02)


def test_the_lock_lasts_as_long_as_the_job(job):
    process = job.start(srun="touch running; while [ -e running ]; do sleep; done")
    wait_for((job.folder / "running").exists)
    assert re.fullmatch(r"7 \S+ \S+\n", job.lock.read_text())
    code, log = job.finish(8, squeue="echo RUNNING")
    assert code == 2
    assert re.search(rf"{job.run} is in use: 7 \S+ \S+; wait for that job, cancel it, or give", log)
    (job.folder / "running").unlink()
    assert process.wait(timeout=20) == 0
    assert not job.lock.exists()


@pytest.mark.parametrize("answer", ["exit 0", INVALID])
def test_the_lock_of_a_job_that_left_is_taken_over(job, answer):
    job.lock.write_text("3 node 2026-01-01T00:00:00\n")
    code, log = job.finish(squeue=answer)
    assert code == 0, log
    assert job.calls == ["srun"]
    assert not job.lock.exists()


def test_a_job_that_was_killed_takes_its_own_lock_again(job):
    job.lock.write_text("7 node 2026-01-01T00:00:00\n")
    code, log = job.finish(restarts=1, squeue="echo RUNNING")
    assert code == 0, log


def test_a_lock_is_left_alone_while_slurm_does_not_answer(job):
    job.lock.write_text("3 node 2026-01-01T00:00:00\n")
    code, _ = job.finish(
        squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    assert code == 2
    assert job.lock.read_text().startswith("3 ")


def test_of_two_jobs_that_find_the_same_old_lock_one_runs(job):
    job.lock.write_text("3 node 2026-01-01T00:00:00\n")
    slow = "echo srun >>calls; sleep 3"
    answer = "case $3 in 3) sleep 0.3;; *) echo RUNNING;; esac"
    real = 'exec /bin/sleep "$1"'
    both = [job.start(number, srun=slow, squeue=answer, sleep=real) for number in (7, 8)]
    codes = [process.wait(timeout=40) for process in both]
    logs = [process.stdout.read() for process in both]
    assert sorted(codes) == [0, 2], logs
    assert job.calls == ["srun"]


def test_a_lock_that_cannot_be_written_ends_the_job_with_the_reason(job):
    job.lock.symlink_to(job.folder / "nowhere" / "job.lock")
    code, log = job.finish()
    assert code == 2
    assert "job.lock cannot be written: read-only folder, full disk?" in log
    assert job.calls == []


def test_a_run_folder_that_cannot_be_made(job):
    job.run.rmdir()
    job.run.write_text("")
    code, log = job.finish()
    assert code == 2
    assert f"{job.run} cannot be made" in log


def test_ranks_that_start_late_still_hear_that_time_is_up(job):
    """A rank that starts removes an old request; the script repeats its own until the ranks have ended."""
    ranks = (
        f"touch started; sleep; sleep; sleep; rm -f {job.run}/stop; "  # ranks that start, after the signal
        f"while [ ! -e {job.run}/stop ]; do sleep; done; rm -f {job.run}/stop; "
        f'echo \'{{"reason": "stop", "step": 1}}\' >{job.run}/interrupted.json'
    )
    process = job.start(srun=ranks)
    wait_for((job.folder / "started").exists)
    process.send_signal(signal.SIGUSR1)
    log, _ = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "requeue 7" in job.calls
    assert not (job.run / "stop").exists()
    assert not job.lock.exists()


@pytest.mark.parametrize(
    ("reason", "restarts", "code"),
    [("stop", 99, 0), ("SIGUSR1", 0, 0), ("SIGTERM", 0, 75), ("SIGINT", 0, 75), ("stop", 100, 75)],
)
def test_what_is_queued_again(job, reason, restarts, code):
    ranks = f'echo \'{{"reason": "{reason}", "step": 1}}\' >{job.run}/interrupted.json'
    found, log = job.finish(restarts=restarts, srun=ranks)
    assert found == code, log
    assert ("requeue 7" in job.calls) == (code == 0)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_sees_the_run_folder_and_gets_the_variables_of_the_job(tmp_path, runtime):
    """An image's own values would win over the job's but for --container-env, or APPTAINERENV_*."""
    container = f"container: {{runtime: {runtime}, image: /images/a b, mounts: [/data]}}"
    job = Job(tmp_path, more=f"env: {{NCCL_DEBUG: WARN, OMP_NUM_THREADS: '3'}}\n{container}\n")
    record = 'printf "%s\\n" "$@" >>calls; env >around'
    srun = record if runtime == "pyxis" else 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    code, log = job.finish(srun=srun, apptainer=record)
    assert code == 0, log
    mounts = f"{ROOT},{tmp_path},{job.run},/data"
    around = dict(
        line.split("=", 1) for line in (tmp_path / "around").read_text().splitlines() if "=" in line
    )
    names = ["OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG"]
    if runtime == "pyxis":
        assert {"--container-image=/images/a b", f"--container-mounts={mounts}"} < set(job.calls)
        assert f"--container-env={','.join(names)}" in job.calls
    else:
        assert job.calls[:6] == ["exec", "--bind", mounts, "--pwd", str(tmp_path), "/images/a b"]
        assert [around[f"APPTAINERENV_{name}"] for name in names] == ["3", "lo", "WARN"]
    assert [around[name] for name in names] == ["3", "lo", "WARN"]
    assert job.calls[-4:] == ["bash", f"{ROOT}/launch/node_entry.sh", "train", "run.yaml"]


def test_the_exit_code_of_the_ranks_is_that_of_the_job(job):
    assert job.finish(srun="exit 3")[0] == 3
