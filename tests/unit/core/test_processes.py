"""A rank ends when its launcher was killed, also through a shell between them, and not because a shell ended.

Strategy: real processes; a script named torchrun is the launcher, SIGKILL its end.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

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
