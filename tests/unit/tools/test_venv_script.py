"""tools/venv.sh: which constraints, when it installs, and what it says when it cannot. pip is replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "venv.sh"
VENV_STUB = """#!/bin/sh
# Used as .venv/bin/python: records pip calls, answers the stamp's question with the real interpreter.
case "$1 $2" in
    "-m pip") echo "$@" >> "{log}"; exit {pip_exit} ;;
esac
exec {python} "$@"
"""


@pytest.fixture
def root(tmp_path):
    """A repository with the files that the script reads, and commands that tests may replace."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints" / "cpu.txt").write_text("torch==2.13.0+cpu\n")
    (tmp_path / "constraints" / "gpu.txt").write_text("torch>=2.6\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "commands").mkdir()
    command(tmp_path, "nvidia-smi", "exit 9")  # installed, but it finds no GPU
    return tmp_path


def command(root, name, body):
    path = root / "commands" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def prepare_venv(root, *, pip_exit=0):
    stub = root / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text(VENV_STUB.format(log=root / "pip.log", pip_exit=pip_exit, python=sys.executable))
    stub.chmod(0o755)


def ensure(root, **environment):
    env = {**os.environ, "PATH": f"{root / 'commands'}:{os.environ['PATH']}", **environment}
    return subprocess.run(
        ["bash", "-c", f'source "{SCRIPT}"; ensure_venv "{root}" && echo "$VENV_PYTHON"'],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pip_calls(root):
    log = root / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_host_without_gpu_installs_the_cpu_build_once(root):
    prepare_venv(root)
    for _ in range(2):
        done = ensure(root)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(root / ".venv" / "bin" / "python")
    (call,) = pip_calls(root)
    assert f"-c {root}/constraints/cpu.txt -e {root}[test,dev]" in call
    assert "is up to date" in done.stderr


def test_a_host_with_gpu_takes_the_range(root):
    prepare_venv(root)
    command(root, "nvidia-smi", "echo 'GPU 0: H100'")
    assert ensure(root).returncode == 0
    assert "constraints/gpu.txt" in pip_calls(root)[0]


def test_another_constraints_file(root):
    prepare_venv(root)
    (root / "mine.txt").write_text("torch==2.12.0\n")
    assert ensure(root, V2PE_TORCH_CONSTRAINTS=str(root / "mine.txt")).returncode == 0
    assert "mine.txt" in pip_calls(root)[0]
    done = ensure(root, V2PE_TORCH_CONSTRAINTS=str(root / "none.txt"))
    assert done.returncode == 1
    assert "none.txt' cannot be read" in done.stderr


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints/cpu.txt"])
def test_a_change_of_what_is_installed_installs_again(root, changed):
    prepare_venv(root)
    ensure(root)
    with open(root / changed, "a") as file:
        file.write("# more\n")
    ensure(root)
    assert len(pip_calls(root)) == 2


def test_a_failed_install_says_the_ways_out_and_is_repeated(root):
    prepare_venv(root, pip_exit=1)
    done = ensure(root)
    assert done.returncode == 1
    assert "PIP_EXTRA_INDEX_URL" in done.stderr
    assert "V2PE_TORCH_CONSTRAINTS=FILE" in done.stderr
    prepare_venv(root, pip_exit=0)
    assert ensure(root).returncode == 0
    assert len(pip_calls(root)) == 2


def test_an_old_python_is_refused(root):
    command(root, "oldpython", '[ "$1" = --version ] && echo "Python 3.8.10"; exit 1')
    done = ensure(root, PYTHON="oldpython")
    assert done.returncode == 1
    assert "Python 3.8.10 is too old, Python 3.10 or newer is needed" in done.stderr


def test_a_missing_python_is_named(root):
    done = ensure(root, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no 'no-such-python' on the PATH" in done.stderr


def test_a_broken_environment_is_made_anew(root):
    command(
        root,
        "newpython",
        f'if [ "$1 $2" = "-m venv" ]; then echo "$@" >> "{root}/venv.log"; exit 1; fi\nexec {sys.executable} "$@"',
    )
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(root / "gone")
    done = ensure(root, PYTHON="newpython")
    assert f"-m venv --clear {root}/.venv" in (root / "venv.log").read_text()
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
