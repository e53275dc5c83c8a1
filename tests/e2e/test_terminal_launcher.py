"""`tools/torchrun.py`: Ctrl-C ends with what the ranks said, not with a traceback of the launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / "tools" / "torchrun.py"
RANK = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (print("the rank says what happens next", flush=True), sys.exit(0)))
pathlib.Path(sys.argv[1]).touch()
time.sleep(120)
"""


def test_ctrl_c_leaves_the_ranks_last_line(tmp_path):
    script, ready = tmp_path / "rank.py", tmp_path / "ready"
    script.write_text(RANK)
    command = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node=1", script, ready]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A suite in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not ready.exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGINT, said
    assert "the rank says what happens next" in said
    assert "Traceback" not in said
