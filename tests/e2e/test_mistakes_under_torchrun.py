"""A user's mistake under torchrun with restarts is reported once.

Strategy: a mistake in a name, found before torch is imported, and one in the layout, found after; with as many restarts
as a job has. That the later starts do nothing is tested at `main` (tests/unit/cli/test_main.py).
"""

import subprocess

import pytest

from tests.support import tiny

pytestmark = pytest.mark.distributed
RESTARTS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    return tiny.prepared(root)


@pytest.mark.parametrize(
    ("override", "message"),
    [("optim.lrr=1e-3", "unknown key optim.lrr"), ("parallel.cp=3", "must divide the world size 2")],
)
def test_a_mistake_is_reported_once_for_all_restarts(config, tmp_path, override, message):
    command = tiny.train_command(config, [override, f"runtime.run_dir={tmp_path}"], ranks=2)
    command.insert(command.index("--standalone"), f"--max-restarts={RESTARTS}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr  # torchrun's own code
    assert message in done.stderr
    assert done.stderr.count("megatron-v2pe: ") == 1, done.stderr
