"""The real launch/submit.py on a real SLURM: a job trains, survives what happens to jobs, and refuses what it must.

Strategy: whatever is done to a job of two nodes, the losses in its run folder equal those of two plain ranks that
nobody disturbed. Strictness: bit-equal, as the layout is the same.
"""

import json
import os
import re
import signal

import pytest

from tests.slurm.conftest import STEPS, ranks_of
from tests.support import tiny

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(600)]
LENGTH = f"optim.steps={STEPS}"


def test_a_job_of_two_nodes_trains_to_its_end(jobs, undisturbed, tmp_path):
    log = jobs.finish(tmp_path, jobs.submit(tmp_path, overrides=[LENGTH]))
    assert "2 nodes, ranks meet at 127.0.0.1:" in log
    assert tiny.curve(tmp_path) == undisturbed
    assert not (tmp_path / "job.lock").exists()


def test_a_job_near_its_limit_saves_and_continues_as_the_same_job(jobs, undisturbed, tmp_path):
    job = jobs.submit(tmp_path, overrides=[LENGTH])
    jobs.wait_for_step(tmp_path, job, step=2)
    jobs.machine.ask("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 does in time
    jobs.wait(tmp_path, job, until=(tmp_path / "interrupted.json").exists, told="was not interrupted")
    record = json.loads((tmp_path / "interrupted.json").read_text())
    assert record["reason"] == "stop"
    assert 2 <= record["step"] < STEPS
    jobs.wait_for_restart(tmp_path, job)
    log = jobs.finish(tmp_path, job)
    assert "start 0:" in log
    assert "start 1:" in log
    assert tiny.curve(tmp_path) == undisturbed


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(jobs, undisturbed, tmp_path):
    job = jobs.submit(tmp_path, overrides=[LENGTH, "checkpoint.save_every=3"])
    jobs.wait_for_step(tmp_path, job, step=5)
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    log = jobs.finish(tmp_path, job)
    assert re.search(r"failed \(exitcode: -9\)", log), log
    assert tiny.curve(tmp_path) == undisturbed


def test_a_second_job_in_the_same_run_folder_is_refused(jobs, tmp_path):
    first = jobs.submit(tmp_path, overrides=["optim.steps=2000"])
    jobs.wait_for_step(tmp_path, first, step=1)
    second = jobs.submit(tmp_path, overrides=["optim.steps=2000"])
    log = jobs.finish(tmp_path, second, state="FAILED")
    assert f"{tmp_path} is in use: {first} " in log
    jobs.machine.ask("scancel", first)
    jobs.finish(tmp_path, first, state="CANCELLED")


def test_a_cancelled_job_stays_cancelled(jobs, tmp_path):
    job = jobs.submit(tmp_path, overrides=["optim.steps=2000"])
    jobs.wait_for_step(tmp_path, job, step=1)
    jobs.machine.ask("scancel", job)
    jobs.finish(tmp_path, job, state="CANCELLED")
    assert jobs.shown(job)["Restarts"] == "0"


def test_preflight_refuses_a_disk_that_is_too_small(jobs, tmp_path):
    job = jobs.submit(tmp_path, verb="preflight", overrides=["--free-gb", "1e9"])
    log = jobs.finish(tmp_path, job, state="FAILED")
    assert re.search(r"^no-go +free space .* GB too few", log, re.M)
    assert re.search(r"^note +time limit .* h left for 5 steps", log, re.M)
    assert re.search(r"^go +shared disk", log, re.M)
    assert log.count("NO-GO: 2 ranks") == 1  # and is not started again
