"""The SLURM of one machine, and jobs of the real launch/submit.py on it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.single_machine import NoSlurmError, SingleMachine, install
from tests.support import tiny
from tests.support.warm import run_verb

ROOT = Path(__file__).parents[2]
STEPS = 10
JOB_SECONDS = 240.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")


@pytest.fixture(scope="session")
def slurm():
    """Two nodes, or a skip with the reason why there are none."""
    try:
        install()
    except NoSlurmError as error:
        pytest.skip(str(error))
    with SingleMachine() as machine:
        yield machine


class Jobs:
    """Jobs of one run configuration.

    Args:
        machine: SLURM they go to.
        config: the run's YAML file.
        cluster: cluster file.
    """

    def __init__(self, machine, config, cluster):
        self.machine, self.config, self.cluster = machine, config, cluster
        self.started = []

    @classmethod
    def of(cls, machine, root, *, python, env=None):
        """Jobs of the run in `root`, whose nodes have one rank each."""
        cluster = root / "cluster.yaml"
        cluster.write_text(f"""
partition: cpu
ranks_per_node: 1
gpus_per_node: 0
cpus_per_node: 1
time: "00:10:00"
setup: ["export V2PE_PYTHON={python}"]
env: {json.dumps(env or {})}
""")
        return cls(machine, root / "run.yaml", cluster)

    def command(self, verb, run_dir, *, nodes=2, overrides=(), options=()):
        arguments = [verb, str(self.config), f"runtime.run_dir={run_dir}", *overrides]
        return [
            sys.executable,
            "launch/submit.py",
            str(self.cluster),
            "--nodes",
            str(nodes),
            *options,
            *arguments,
        ]

    def submit(self, run_dir, *, verb="train", nodes=2, overrides=(), options=()):
        """Id of a new job."""
        done = subprocess.run(
            self.command(verb, run_dir, nodes=nodes, overrides=overrides, options=options),
            cwd=ROOT,
            env=self.machine.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.started.append(re.search(r"Submitted batch job (\d+)", done.stdout)[1])
        return self.started[-1]

    def shown(self, job):
        """Fields of `scontrol show job`."""
        text = self.machine.ask("scontrol", "show", "job", job, "-o")
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, run_dir, job, *, until, failure):
        """Wait for `until()`; fails with the job's log when it ended without it, or time is up."""
        end, next_look = time.monotonic() + JOB_SECONDS, 0.0
        while not until():
            ended = False
            if time.monotonic() > next_look:  # a look costs a process, and steps are short
                ended = self.shown(job).get("JobState", "") in ENDED
                next_look = time.monotonic() + 1.0
            if (ended and not until()) or time.monotonic() > end:
                raise AssertionError(
                    f"{failure}: {self.shown(job)}\n{self.log(run_dir, job)[-8000:]}\n{self.machine.logs()}"
                )
            time.sleep(0.02)

    def finish(self, run_dir, job, *, state="COMPLETED"):
        """Wait for the end of a job and return its log."""
        end = time.monotonic() + JOB_SECONDS
        while (found := self.shown(job)).get("JobState", "") not in ENDED and time.monotonic() < end:
            time.sleep(0.3)
        assert found["JobState"] == state, f"{found}\n{self.log(run_dir, job)[-8000:]}"
        return self.log(run_dir, job)

    def wait_for_log(self, run_dir, job, text):
        """Wait until something is in the job's log, over all its starts."""
        end = time.monotonic() + JOB_SECONDS
        while text not in self.log(run_dir, job):
            assert time.monotonic() < end, f"no {text!r}: {self.shown(job)}\n{self.log(run_dir, job)[-8000:]}"
            time.sleep(0.1)

    def wait_until_gone(self, job):
        """Wait until the job, or every job of an array, has left the queue."""
        end = time.monotonic() + JOB_SECONDS
        while self.machine.ask("squeue", "-h", "-j", job, "-o", "%T"):
            assert time.monotonic() < end, self.shown(job)
            time.sleep(0.3)

    def prolong(self, job):
        """Ten minutes for the next start of a job that queues itself again."""
        end = time.monotonic() + JOB_SECONDS
        while (found := self.shown(job))["Restarts"] == "0" or found["TimeLimit"] != "00:10:00":
            assert time.monotonic() < end, found
            if found["Restarts"] != "0":
                self.machine.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")
            time.sleep(0.2)

    def log(self, run_dir, job):
        path = Path(run_dir) / f"slurm-{job}.log"
        return path.read_text(errors="replace") if path.exists() else "(no log)"

    def wait_for_step(self, run_dir, job, *, step):
        """Wait until a step is in the metrics."""
        metrics = Path(run_dir) / "metrics.jsonl"
        self.wait(run_dir, job, until=lambda: last_step(metrics) >= step, failure=f"no step {step}")


def last_step(metrics):
    """Last whole line's step, 0 where there is none."""
    if not metrics.exists():
        return 0
    lines = metrics.read_text().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def processes_of(run_dir, *, node):
    """Ids of all processes of a run on a node: launcher, rank, its helpers."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            around = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            continue
        if (
            f"runtime.run_dir={run_dir}" in words
            and f"SLURMD_NODENAME={node}" in around
            and "srun" not in words[0]
        ):
            found.append(int(folder.name))
    return found


def ranks_of(run_dir):
    """Process ids of the two ranks, as their heartbeats say."""
    return [json.loads((run_dir / "heartbeats" / f"rank_{rank}.json").read_text())["pid"] for rank in (0, 1)]


def signal_all(processes, number):
    """Signal processes, some of which may have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


@pytest.fixture(scope="session")
def jobs(slurm, tmp_path_factory):
    """Jobs of the tiny model, one rank on each of two nodes."""
    root = tmp_path_factory.mktemp("slurm")
    tiny.run_yaml(
        root / "run.yaml",
        checkpoint=tiny.import_golden(root / "checkpoint"),
        meta=tiny.make_data(root / "data"),
        run_dir=root / "run",
    )
    started = Jobs.of(slurm, root, python=sys.executable)
    yield started
    for job in started.started:
        slurm.ask("scancel", job)


@pytest.fixture(scope="session")
def undisturbed(jobs, tmp_path_factory):
    """Losses and gradient norms of the same run on two plain ranks."""
    folder = tmp_path_factory.mktemp("plain")
    done = run_verb("train", jobs.config, f"runtime.run_dir={folder}", f"optim.steps={STEPS}", ranks=2)
    assert done.returncode == 0, done.stderr
    return tiny.curve(folder)
