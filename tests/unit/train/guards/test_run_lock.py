"""train.run_lock: a second process is refused by name, and nothing is left of a process that was killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.train.guards import run_lock
from megatron_v2pe.train.guards.run_lock import FILE, locked

HOLDER = """
import sys, time
from pathlib import Path
from megatron_v2pe.train.guards.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that holds the lock of tmp_path."""
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.5)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path, holder):
    words = rf"in which another process trains \(process {holder.pid} on {socket.gethostname()}, since .*touch .*/stop"
    with pytest.raises(ConfigError, match=words) as caught, locked(tmp_path):
        pass
    assert caught.value.is_final


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    with locked(tmp_path):
        assert (tmp_path / FILE).read_text().split()[1] == str(os.getpid())


def test_a_process_that_is_ending_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "_WAIT_S", 30.0)
    monkeypatch.setattr(
        run_lock.time, "sleep", lambda seconds, sleep=time.sleep: (holder.kill(), sleep(seconds))
    )
    with locked(tmp_path):
        pass


def test_a_holder_on_another_machine_may_be_one_that_vanished(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(run_lock, "_WAIT_FOR_OTHERS_S", 0.5)
    with pytest.raises(ConfigError) as caught, locked(tmp_path):
        pass
    assert not caught.value.is_final  # the launcher's next start tries again


def test_other_ranks_and_the_next_run_take_it(tmp_path, holder):
    with locked(tmp_path, by_this_rank=False):
        pass
    holder.kill()
    for _ in range(2):
        with locked(tmp_path):
            pass
