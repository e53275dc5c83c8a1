"""The real launch/submit.py on a real SLURM of two nodes: a job trains, survives what happens to jobs, and is refused.

Strategy: whatever is done to a job of two nodes, the losses in its run folder equal those of two plain ranks that
nobody disturbed. Strictness: bit-equal, as the layout is the same. Ranks are stopped (SIGSTOP) while SLURM is waited
for, so that a run of a second is still there when its time limit comes.
"""

import os
import re
import signal

import pytest

from tests.slurm.conftest import STEPS, Jobs, last_step, processes_of, ranks_of, signal_all
from tests.support import tiny

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
LENGTH = f"optim.steps={STEPS}"


def test_a_job_of_two_nodes_has_its_run_folder_for_itself_and_trains_to_its_end(jobs, undisturbed, tmp_path):
    job = jobs.submit(tmp_path, overrides=[LENGTH])
    jobs.wait_for_step(tmp_path, job, step=1)
    signal_all(ranks_of(tmp_path), signal.SIGSTOP)
    second = jobs.submit(tmp_path, overrides=[LENGTH])
    log = jobs.finish(tmp_path, second, state="FAILED")
    assert f"{tmp_path} is in use: {job} " in log
    signal_all(ranks_of(tmp_path), signal.SIGCONT)
    assert "2 nodes, ranks meet at 127.0.0.1:" in jobs.finish(tmp_path, job)
    assert tiny.curve(tmp_path) == undisturbed
    assert not (tmp_path / "job.lock").exists()


def test_a_job_near_its_time_limit_saves_and_continues_as_the_same_job(jobs, undisturbed, tmp_path):
    """SLURM looks every 30 s, half a minute ahead: the signal comes between 20 and 50 s after the start."""
    job = jobs.submit(tmp_path, overrides=[LENGTH], options=["--time", "00:02:00", "--warn-seconds", "70"])
    jobs.wait_for_step(tmp_path, job, step=1)
    signal_all(ranks_of(tmp_path), signal.SIGSTOP)
    jobs.wait_for_log(tmp_path, job, "the time limit is near")
    signal_all(ranks_of(tmp_path), signal.SIGCONT)
    jobs.prolong(job)
    jobs.wait_for_log(tmp_path, job, "] start 1:")
    log = jobs.finish(tmp_path, job)
    step = int(re.search(r'interrupted: {"reason": "stop", "step": (\d+)}', log)[1])
    assert 1 <= step < STEPS
    assert f"resumed from {tmp_path}/checkpoints/step_{step:08d}" in log
    assert tiny.curve(tmp_path) == undisturbed


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(jobs, undisturbed, tmp_path):
    job = jobs.submit(tmp_path, overrides=[LENGTH, "checkpoint.save_every=3"])
    jobs.wait_for_step(tmp_path, job, step=5)
    os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
    log = jobs.finish(tmp_path, job)
    assert re.search(r"failed \(exitcode: -9\)", log), log
    assert tiny.curve(tmp_path) == undisturbed


def test_a_job_of_a_node_that_dies_is_queued_again(jobs, undisturbed, tmp_path):
    """The node's daemon is killed and its ranks are frozen, as a machine that hangs; then it starts anew."""
    job = jobs.submit(tmp_path, overrides=[LENGTH, "checkpoint.save_every=3"])
    jobs.wait_for_step(tmp_path, job, step=5)
    on_node = processes_of(tmp_path, node="n2")
    assert on_node
    jobs.machine.kill_node("n2")
    signal_all(on_node, signal.SIGSTOP)
    try:
        jobs.wait(tmp_path, job, until=lambda: jobs.shown(job)["Restarts"] == "1", failure="not queued again")
    finally:
        signal_all(on_node, signal.SIGKILL)
        jobs.machine.start_node("n2")
    jobs.wait_for_log(tmp_path, job, "] start 1:")
    jobs.finish(tmp_path, job)
    assert tiny.curve(tmp_path) == undisturbed


def test_a_signal_to_the_ranks_queues_the_job_again_and_a_cancelled_job_stays_cancelled(jobs, tmp_path):
    job = jobs.submit(tmp_path, nodes=1, overrides=["optim.steps=500"])
    jobs.wait_for_step(tmp_path, job, step=1)
    jobs.machine.ask("scancel", "--signal=USR1", job)
    jobs.wait_for_log(tmp_path, job, '"reason": "SIGUSR1"')
    jobs.wait_for_log(tmp_path, job, "] start 1:")
    before = last_step(tmp_path / "metrics.jsonl")
    jobs.wait_for_step(tmp_path, job, step=before + 1)
    jobs.machine.ask("scancel", job)
    jobs.finish(tmp_path, job, state="CANCELLED")
    assert jobs.shown(job)["Restarts"] == "1"


@pytest.mark.parametrize(("array", "tasks"), [("1-2%1", ["1", "2"]), ("1-2", None)])
def test_jobs_of_an_array_are_alone_in_their_run_folder(slurm, tmp_path, array, tasks):
    """One after the other where the array says so; else the second is refused. The command is a stand-in."""
    run_dir, fake = tmp_path / "two words", tmp_path / "python"
    run_dir.mkdir()
    fake.write_text('#!/bin/bash\necho "$SLURM_ARRAY_TASK_ID $SLURM_NODEID" >>"$CALLS"\nsleep 3\n')
    fake.chmod(0o755)
    jobs = Jobs.of(slurm, tmp_path, python=fake, env={"CALLS": str(run_dir / "calls")})
    job = jobs.submit(run_dir, options=["--array", array])
    jobs.wait_until_gone(job)
    calls = [line.split() for line in (run_dir / "calls").read_text().splitlines()]
    logs = [path.read_text() for path in run_dir.glob("slurm-*.log")]
    assert len(logs) == 2
    if tasks:
        assert [sorted(calls[:2]), sorted(calls[2:])] == [[[task, "0"], [task, "1"]] for task in tasks]
        return
    assert sorted(node for _, node in calls) == ["0", "1"]
    assert len({task for task, _ in calls}) == 1
    assert sum(" is in use: " in log for log in logs) == 1


def test_preflight_refuses_a_disk_that_is_too_small(jobs, tmp_path):
    job = jobs.submit(tmp_path, verb="preflight", nodes=1, overrides=["--free-gb", "1e9"])
    log = jobs.finish(tmp_path, job, state="FAILED")
    assert re.search(r"^no-go +free space .* GB too few", log, re.M)
    assert re.search(r"^note +time limit .* h left for 5 steps", log, re.M)
    assert log.count("NO-GO: 1 rank,") == 1  # and is not started again
