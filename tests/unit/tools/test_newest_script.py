"""tests/run_newest.sh: what it installs for which Python, when, what it says (stubs of Python)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
# An interpreter: its version, what pip and pytest do, and what torch and megatron-core it has.
STUB = """#!/bin/sh
case "$*" in
    --version) echo "Python {version}" ;;
    "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    "-m pip "*) echo "$@" >>"{log}"; exit {pip_exit} ;;
    "-m pytest "*) echo "pytest $3 $4 other=$V2PE_OTHER_PYTHON" ;;
    *"import torch"*) echo "{versions}" ;;
    *"version_info < (3, 12)"*) exit {is_old} ;;
esac
"""


@pytest.fixture
def root(tmp_path):
    for name in (
        "tests/run_newest.sh",
        "tools/venv.sh",
        "constraints/newest-cpu.txt",
        "constraints/newest-any.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return tmp_path


def interpreter(path, *, version="3.11.7", versions="2.13.0+cpu 0.19.2", pip_exit=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    is_old = int(int(version.split(".")[1]) < 12)
    log = path.parent / "pip.log"
    path.write_text(
        STUB.format(version=version, versions=versions, pip_exit=pip_exit, is_old=is_old, log=log)
    )
    path.chmod(0o755)
    return path


def first(root, versions="2.13.0+cpu 0.16.1"):
    return interpreter(root / ".venv" / "bin" / "python", versions=versions)


def run(root, python, *arguments, **environment):
    env = {**os.environ, "PYTHON": str(python), **environment}
    for name in ("V2PE_OTHER_PYTHON", "V2PE_TORCH_CONSTRAINTS"):
        if name not in environment:
            env.pop(name, None)
    command = ["bash", str(root / "tests" / "run_newest.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def pip_calls(python):
    return (python.parent / "pip.log").read_text().splitlines()


def test_an_older_python_gets_megatron_core_without_the_check_of_its_version(root):
    python, other = interpreter(root / "bin" / "python3"), first(root)
    for _ in range(2):  # the second run installs nothing
        done = run(root, python)
        assert done.returncode == 0, done.stderr
        assert f"other={other}" in done.stdout
    packages, megatron = pip_calls(python)
    assert f"-e {root}[test] triton>=3" in packages
    assert "--no-deps --ignore-requires-python megatron-core==0.19.2" in megatron
    lines = (root / ".venv-newest" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("megatron")] == []


def test_a_newer_python_and_another_one_make_it_anew(root):
    first(root)
    run(root, interpreter(root / "bin" / "python3"))
    newer = interpreter(root / "newer" / "python3", version="3.13.0")
    done = run(root, newer)
    assert done.returncode == 0, done.stderr
    (call,) = pip_calls(newer)
    assert f"-c {root}/constraints/newest-cpu.txt -e {root}[test]" in call


def test_a_missing_build_of_torch_is_explained(root):
    python = interpreter(root / "bin" / "python3", version="3.13.0", pip_exit=1)
    done = run(root, python)
    assert done.returncode == 1
    assert "asks for the CPU build of torch" in done.stderr
    assert "V2PE_TORCH_CONSTRAINTS=constraints/newest-any.txt" in done.stderr
    assert not (root / ".venv-newest" / "stamp").exists()


def test_a_whole_run_needs_the_first_environment_or_leave_without(root):
    python = interpreter(root / "bin" / "python3")
    done = run(root, python)
    assert done.returncode == 1
    assert "no first environment at" in done.stderr
    assert "other=\n" in run(root, python, V2PE_OTHER_PYTHON="none").stdout
    assert run(root, python, "tests/unit/config").stdout == "pytest tests/unit/config  other=\n"


def test_another_torch_is_not_compared_with_and_that_is_said(root):
    first(root, versions="2.14.1 0.16.1")
    done = run(root, interpreter(root / "bin" / "python3"))
    assert done.returncode == 0
    assert "NOT compared: the environments have torch 2.13.0+cpu and 2.14.1" in done.stderr
    assert done.stdout.endswith("other=\n")


def test_constraints_that_cannot_be_read(root):
    done = run(root, interpreter(root / "bin" / "python3"), V2PE_TORCH_CONSTRAINTS="none.txt")
    assert done.returncode == 1
    assert "'none.txt' cannot be read" in done.stderr
