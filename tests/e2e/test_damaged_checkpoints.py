"""Damaged and interrupted checkpoints of a run: named, and never replaced by older ones in silence."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.retention import complete_steps, step_path
from tests.support import tiny
from tests.support.warm import run_verb

SAVES = ["checkpoint.save_every=1", "checkpoint.keep=9"]
LAST = 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of five steps with a checkpoint after each; configuration and curve."""
    root = tmp_path_factory.mktemp("damaged")
    config = tiny.prepared(root)
    tiny.train(config, SAVES)
    return root / "run", config, tiny.curve(root / "run")


def attempt(config, overrides, *flags):
    """Start a run; exit code and stderr."""
    done = run_verb("train", config, *overrides, *flags)
    return done.returncode, done.stderr


def largest_state_file(run_dir):
    folder = step_path(run_dir, LAST)
    return max((folder / "state").iterdir(), key=lambda path: path.stat().st_size)


def truncate(run_dir):
    path = largest_state_file(run_dir)
    os.truncate(path, path.stat().st_size - 1)
    return f"state/{path.name} has "


def flip(run_dir):
    path = largest_state_file(run_dir)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return f"state/{path.name} has the right size but other contents"


def flip_small(run_dir):
    path = step_path(run_dir, LAST) / "state" / "metadata.json"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    return "state/metadata.json has the right size but other contents"


def swap_plain_values(run_dir):
    name = "state/common.pt"
    shutil.copyfile(step_path(run_dir, LAST - 1) / name, step_path(run_dir, LAST) / name)
    return f"{name} has "


@pytest.mark.parametrize(
    ("harm", "flags"),
    [
        pytest.param(truncate, [], marks=pytest.mark.slow),
        pytest.param(flip, ["--verify-checkpoint", "full"], marks=pytest.mark.slow),
        (flip_small, []),
        pytest.param(swap_plain_values, [], marks=pytest.mark.slow),
    ],
)
def test_a_damaged_newest_checkpoint_stops_the_run_which_falls_back_only_with_the_option(
    finished, tmp_path, harm, flags
):
    """The last step is trained again from the checkpoint before it, to the bit, and replaces the damaged folder."""
    source, config, wanted = finished
    shutil.copytree(source, tmp_path / "run")
    reported = harm(tmp_path / "run")
    overrides = [*SAVES, f"runtime.run_dir={tmp_path / 'run'}"]
    code, log = attempt(config, overrides, *flags)
    assert code == 2, log
    assert reported in log
    assert f"the newest good checkpoint is {step_path(tmp_path / 'run', LAST - 1)}" in log
    assert "add checkpoint.fallback=true" in log
    assert tiny.curve(tmp_path / "run") == wanted  # nothing was trained
    code, log = attempt(config, [*overrides, "checkpoint.fallback=true"], *flags)
    assert code == 0, log
    assert "ERROR" in log
    assert "an OLDER checkpoint" in log
    assert f"resumed from {step_path(tmp_path / 'run', LAST - 1)} at step {LAST - 1}" in log
    assert tiny.curve(tmp_path / "run") == wanted
    read_info(step_path(tmp_path / "run", LAST), verify="full")


KILLED = """
import os, signal, sys
from megatron_v2pe.checkpoint import save
from megatron_v2pe.checkpoint.files import staging
from megatron_v2pe.cli.main import main

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def killed_in(module, name, step):
    plain = getattr(module, name)
    calls = []
    def wrapper(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == step else plain(*args, **kwargs)
    setattr(module, name, wrapper)

moment = sys.argv.pop(1)
if moment == "after the tensors":
    killed_in(save, "copy_hf_folder", 3)
elif moment == "before the rename":
    killed_in(staging, "commit_folder", 3)
else:
    killed_in(save, "write_latest", 3)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("after the tensors", [1, 2]),
        pytest.param("before the rename", [1, 2], marks=pytest.mark.slow),
        pytest.param("before latest", [1, 2, 3], marks=pytest.mark.slow),
    ],
)
def test_kill_in_the_middle_of_a_save_loses_nothing_that_was_saved(finished, tmp_path, moment, left):
    """kill -9 during the third save: what is left loads in full, and the run ends as if nothing had happened."""
    _, config, wanted = finished
    overrides = [*SAVES, f"runtime.run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", KILLED, moment, "train", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert complete_steps(tmp_path / "run") == left
    for step in left:
        read_info(step_path(tmp_path / "run", step), verify="full")
    pointer = tmp_path / "run" / "checkpoints" / "latest"
    assert pointer.read_text() == "step_00000002\n"
    log = tiny.train(config, overrides)
    assert f"resumed from {step_path(tmp_path / 'run', left[-1])}" in log
    assert tiny.curve(tmp_path / "run") == wanted
    assert complete_steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.incomplete"))


@pytest.mark.slow
def test_latest_that_names_a_lost_folder_stops_the_run(finished, tmp_path):
    source, config, _ = finished
    shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(step_path(tmp_path / "run", LAST))
    code, log = attempt(config, [*SAVES, f"runtime.run_dir={tmp_path / 'run'}"])
    assert code == 2, log
    assert "latest names step_00000005, which does not exist" in log
    assert f"the newest good checkpoint is {step_path(tmp_path / 'run', LAST - 1)}" in log
