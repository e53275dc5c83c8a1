"""A checkpoint of one megatron-core resumed by another: the second environment of tests/run_newest.sh runs this.

V2PE_OTHER_PYTHON is the interpreter of the other environment. Both are of one torch, so numbers are equal to the bit.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from tests.support import tiny

OTHER = os.environ.get("V2PE_OTHER_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not OTHER, reason="needs a second environment: bash tests/run_newest.sh, which sets V2PE_OTHER_PYTHON"
)


def version(python):
    code = "import torch, megatron.core as m; print(torch.__version__, m.__version__)"
    done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-2:]


def train(python, config, *overrides):
    command = [python, "-m", "megatron_v2pe", "train", str(config), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def versions():
    here, there = version(sys.executable), version(OTHER)
    assert here[0] == there[0], "the environments differ in torch, so bits may differ for another reason"
    assert here[1] != there[1]
    return here[1], there[1]


@pytest.mark.timeout(1800)  # three runs, each in a process of its own
@pytest.mark.parametrize("first", ["this one's", "the other's"])
def test_a_checkpoint_of_either_version_resumes_under_the_other_to_the_bit(versions, tmp_path, first):
    """Two updates after the resume: a wrong step count of Adam shows in the second only."""
    config = tiny.prepared(tmp_path, run="whole")
    writer, reader = (sys.executable, OTHER) if first == "this one's" else (OTHER, sys.executable)
    train(writer, config, "checkpoint.save_every=3", "checkpoint.keep=3")
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    shutil.copytree(whole, mixed)
    tiny.back_to(mixed, "step_00000003")
    train(reader, config, f"runtime.run_dir={mixed}", "checkpoint.save_every=3", "checkpoint.keep=3")
    assert tiny.curve(mixed) == tiny.curve(whole)
    last = Path("checkpoints") / "step_00000005"
    ours, theirs = (StateReader(state_path(run / last)) for run in (mixed, whole))
    assert ours.tensors == theirs.tensors
    different = [name for name in ours.tensors if not torch.equal(ours.read(name), theirs.read(name))]
    assert different == []  # weights and moments
