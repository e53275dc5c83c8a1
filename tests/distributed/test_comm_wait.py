"""Communication wait on gloo: a rank that is slow waits least, through every kind of call, and torch is left as it was.

Sleeping represents computing: what counts is when a rank reaches a call. Half of what was slept is tolerance, for
machines that do other work beside.
"""

import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_v2pe.cli.main import main
from megatron_v2pe.parallel.runtime.comm_clock import CommClock
from megatron_v2pe.train.metrics.stragglers import find_straggler
from tests.support import tiny
from tests.support.injected import NAP_SECONDS
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
SLOW, SECONDS = 1, 0.5


def calls(rank, world_size):
    """A round of each way to wait: blocking, with a handle, coalesced, and from rank to rank."""
    ones = torch.ones(world_size * 4)
    yield lambda: dist.all_reduce(ones)
    yield lambda: dist.all_reduce(ones, async_op=True).wait()
    yield lambda: dist.all_to_all_single(torch.empty_like(ones), ones)

    def pass_on():
        ops = [
            dist.P2POp(dist.isend, ones, (rank + 1) % world_size),
            dist.P2POp(dist.irecv, torch.empty_like(ones), (rank - 1) % world_size),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    yield pass_on


def measure(rank, world_size):
    clock, found = CommClock(torch.device("cpu")), []
    before = dict(vars(dist.Work))
    for step, call in enumerate(calls(rank, world_size), start=1):
        dist.barrier()
        with clock.measured(step):
            if rank == SLOW:
                time.sleep(SECONDS)
            call()
        found.append(clock.seconds())
    assert dict(vars(dist.Work)) == before
    return found


def test_the_slow_rank_waits_least_in_every_kind_of_call():
    *collectives, to_the_next = zip(*run_ranks(measure, 3), strict=True)
    for waits in collectives:
        found = find_straggler(waits, step_seconds=SECONDS)
        assert found.rank == SLOW
        assert found.seconds == pytest.approx(SECONDS, rel=0.5)
    assert to_the_next[SLOW] < 0.5 * SECONDS < to_the_next[SLOW + 1]  # which receives from it


def test_a_run_names_its_slow_rank(tmp_path, capsys):
    """In the metrics and in the summary of the run; two slow steps are nothing to warn of."""
    checkpoint, meta = tiny.import_golden(tmp_path / "checkpoint"), tiny.make_data(tmp_path / "data")
    config = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fault = ["-m", "tests.support.injected", "slow", "1", "3,4"]
    done = subprocess.run(
        [*launcher, *fault, config], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = tiny.metrics(tmp_path / "run")
    for line in lines[2:4]:
        assert line["straggler"] == 1
        assert line["straggler_s"] == pytest.approx(line["comm_wait_s_max"] - line["comm_wait_s_min"])
        assert line["straggler_s"] == pytest.approx(NAP_SECONDS, rel=0.5)
    assert "step 4/5 " in done.stderr
    assert "STRAGGLER" not in done.stderr
    assert main(["runs", str(tmp_path / "run")]) == 0
    assert re.search(r"^stragglers .*rank 1 in \d of 5 steps", capsys.readouterr().out, re.M)


def test_an_error_within_leaves_torch_as_it_was():
    before = vars(dist.Work)["wait"]
    with pytest.raises(ZeroDivisionError), CommClock(torch.device("cpu")).measured(1):
        raise ZeroDivisionError
    assert vars(dist.Work)["wait"] is before
