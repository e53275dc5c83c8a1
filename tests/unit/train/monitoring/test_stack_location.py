"""Where a process hangs: threads that wait in known lines, some in real collectives of torch."""

import sys
import threading
import time

import torch
import torch.distributed as dist

from megatron_v2pe.core import jsonl
from megatron_v2pe.train.monitoring import stack_location as place
from megatron_v2pe.train.monitoring.stack_location import locate_stall


class Gate:
    """Blocks the thread that waits on it for good."""

    def __init__(self):
        self.entered = threading.Event()

    def wait(self, *_args, **_kwargs):
        self.entered.set()
        time.sleep(1000)  # in a daemon thread: what called it must not continue


def frame_at_gate(function):
    """Runs `function(gate)` in a thread; the thread and its frame that called the gate."""
    gate = Gate()
    thread = threading.Thread(target=function, args=(gate,), daemon=True)
    thread.start()
    assert gate.entered.wait(20)
    frame = sys._current_frames()[thread.ident]
    while frame.f_code is not Gate.wait.__code__:
        frame = frame.f_back
    return thread.ident, frame.f_back


def stand(function):
    """Where the thread of `function` is."""
    ident, frame = frame_at_gate(function)
    return locate_stall({ident: frame}, main=ident)


def test_a_collective_is_named_with_the_line_that_called_it(monkeypatch):
    def enters(gate):
        monkeypatch.setattr(dist.distributed_c10d, "_rank_not_in_group", gate.wait)
        dist.all_reduce(torch.zeros(1))

    found = stand(enters)
    assert found.is_waiting
    assert found.call == "all_reduce"
    assert found.at.endswith("in enters")
    assert "test_stack_location.py" in found.at
    assert str(found).startswith("waits in all_reduce (")


def test_a_wait_for_what_was_started_before_is_named_by_its_line():
    def waits(request):
        request.wait()

    found = stand(waits)
    assert (found.is_waiting, found.call) == (True, "request.wait()")
    assert found.at.endswith("in waits")


def test_a_line_that_is_no_wait_is_elsewhere():
    def computes(gate):
        calls = {"work": gate.wait}
        calls["work"]()

    found = stand(computes)
    assert (found.is_waiting, found.call) == (False, 'calls["work"]()')
    assert str(found).startswith('is at calls["work"]() (')


def test_the_function_of_this_package_is_named_too(monkeypatch):
    def reads(gate):
        monkeypatch.setattr(jsonl, "_parse", gate.wait)
        list(jsonl.read_jsonl(__file__))

    found = stand(reads)
    assert found.at.startswith("megatron_v2pe/core/jsonl.py:")
    assert found.within == ""  # it is `at` already

    def reads_through_another(gate):
        def parse(text, where):
            gate.wait()

        monkeypatch.setattr(jsonl, "_parse", parse)
        list(jsonl.read_jsonl(__file__))

    found = stand(reads_through_another)
    assert found.at.endswith("in parse")
    assert found.within.startswith("megatron_v2pe/core/jsonl.py:")


def test_threads_of_autograd_are_read_only_during_a_backward(monkeypatch):
    frame = sys._getframe()
    monkeypatch.setattr(place, "_BACKWARD", frame.f_code.co_name)

    def enters(gate):
        monkeypatch.setattr(dist.distributed_c10d, "_rank_not_in_group", gate.wait)
        dist.all_reduce(torch.zeros(1))

    ident, other = frame_at_gate(enters)
    frames = {1: frame, ident: other}
    assert locate_stall(frames, main=1).call == "all_reduce"
    monkeypatch.setattr(place, "_BACKWARD", "something else")
    assert not locate_stall(frames, main=1).is_waiting


def test_a_training_thread_that_is_gone():
    assert locate_stall({}, main=1).at == "the training thread has ended"
