"""The clock's arithmetic on a world of one rank; on CUDA with events that only remember when they were recorded."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_v2pe.parallel.runtime.comm_clock import CUDA_EVERY, CommClock


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def ticking_events(monkeypatch):
    """Each record is one millisecond after the one before."""

    class Event:
        now = 0

        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1
            self.at = Event.now

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Event


def test_host_time_is_that_of_the_steps_own_waits(alone):
    clock, x = CommClock(torch.device("cpu")), torch.ones(2)
    with clock.measured(1):
        dist.all_reduce(x)
    first = clock.seconds()
    assert first > 0
    dist.all_reduce(x)
    assert clock.seconds() == first  # outside
    with clock.measured(2):
        pass
    assert clock.seconds() == 0


def test_on_cuda_calls_and_waits_are_timed_one_step_in_ten(alone, ticking_events):
    clock, x = CommClock(torch.device("cuda")), torch.ones(2)
    methods = {owner: dict(vars(owner)) for owner in (dist.Work, dist.ProcessGroup)}
    with clock.measured(CUDA_EVERY):
        dist.all_reduce(x)
        work = dist.all_reduce(x, async_op=True)
        work.wait()
    assert clock.seconds() == pytest.approx(4 / 1000)  # two calls, two waits
    with clock.measured(CUDA_EVERY + 1):
        dist.all_reduce(x)
    assert math.isnan(clock.seconds())
    assert {owner: dict(vars(owner)) for owner in methods} == methods
