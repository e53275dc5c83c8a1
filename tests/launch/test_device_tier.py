"""bash tests/run.sh -m gpu: on a machine without a network, collecting the GPU tests and no others.

Strategy: a copy of the tree whose set-up of an environment fails as it does without a network. Strictness: any test of
another folder, or any call of the set-up, is a failure.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    """This clone, but for `.venv` and what sets it up."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    for path in (ROOT / "tests").iterdir():
        if path.name not in ("run.sh", "__pycache__"):
            (tmp_path / "tests" / path.name).symlink_to(path)
    for name in ("pyproject.toml", "megatron_v2pe"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname"):  # and no python3, which might have the packages
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "tools" / "venv.sh").write_text('ensure_venv() { echo "no network" >&2; return 1; }\n')
    return tmp_path


def run(tree, *arguments, python):
    command = ["bash", str(tree / "tests" / "run.sh"), *arguments]
    environment = {**os.environ, "PYTHON": str(python), "PATH": str(tree / "bin")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_only_the_gpu_tests_are_collected(tree):
    done = run(tree, "-m", "gpu", "--collect-only", "-q", python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(collected) > 8
    assert all(line.startswith("tests/gpu/") for line in collected)
    assert "no network" not in done.stderr


def test_a_python_without_the_packages_is_named(tree):
    done = run(tree, "-m", "gpu", python=tree / "no_python")
    assert done.returncode == 1
    assert "megatron.core" in done.stderr
    assert "set PYTHON" in done.stderr


def test_everything_else_sets_up_an_environment(tree):
    done = run(tree, "tests/gpu", python=sys.executable)
    assert done.returncode == 1
    assert "no network" in done.stderr
