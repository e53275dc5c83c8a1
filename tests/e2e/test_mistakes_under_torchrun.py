"""A user's mistake under torchrun with restarts: told once, and no start is spent on it again.

Strategy: a mistake in a name, found before torch is imported, and one in the layout, found after; with as many restarts
as a job has.
"""

import subprocess
import time

import pytest

from tests.support import tiny

pytestmark = pytest.mark.distributed
RESTARTS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    checkpoint = tiny.import_golden(root / "checkpoint")
    meta = tiny.make_data(root / "data")
    return tiny.run_yaml(root / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=root / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [("optim.lrr=1e-3", "unknown key optim.lrr"), ("parallel.cp=3", "must divide the world size 2")],
)
def test_a_mistake_is_told_once_and_costs_no_restarts(config, tmp_path, override, message):
    command = tiny.train_command(config, [override, f"runtime.run_dir={tmp_path}"], ranks=2)
    command.insert(command.index("--standalone"), f"--max-restarts={RESTARTS}")
    started_at = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    told_at, text = 0.0, ""
    for line in process.stderr:
        text += line
        if message in line and not told_at:
            told_at = time.monotonic()
    assert process.wait(timeout=100) == 1, text  # torchrun's own code
    assert text.count("megatron-v2pe: ") == 1, text
    # All restarts together take less than the start that found it.
    assert time.monotonic() - told_at < max(5.0, told_at - started_at)
