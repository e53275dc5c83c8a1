"""A wheel works without the clone: verbs, recipes, cluster files and submit.py from an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder into which the wheel of this clone is installed, away from the clone."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # built from a copy, so that no build folder appears in the clone
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "-co",
            "--exclude-standard",
            "megatron_v2pe",
            "launch",
            "*.toml",
            "*.py",
            "README.md",
        ],
        cwd=CLONE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (CLONE / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((CLONE / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(root / "site"), str(source)], check=True, timeout=120)
    return root / "site"


def verb(installed, folder, *arguments):
    around = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "megatron_v2pe", *arguments],
        cwd=folder,
        env=around,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_recipes_are_listed_and_copied(installed, tmp_path):
    listed = verb(installed, tmp_path, "recipes")
    assert listed.returncode == 0, listed.stderr
    assert "internvl2_2b_32k.yaml" in listed.stdout
    assert "h100_pyxis.yaml" in listed.stdout
    assert str(installed / "megatron_v2pe" / "launch" / "submit.py") in listed.stdout
    assert verb(installed, tmp_path, "recipes", "internvl2_2b_32k", "--out", "run.yaml").returncode == 0
    assert (tmp_path / "run.yaml").read_text().startswith("# InternVL2-2B at 32K")
    again = verb(installed, tmp_path, "recipes", "internvl2_2b_32k", "--out", "run.yaml")
    assert again.returncode == 2
    assert "run.yaml exists" in again.stderr
    unknown = verb(installed, tmp_path, "recipes", "nothing")
    assert unknown.returncode == 2
    assert "'nothing'" in unknown.stderr


def test_planning_and_submitting_need_no_clone(installed, tmp_path):
    for name in ("internvl2_2b_32k", "cpu_venv"):
        assert verb(installed, tmp_path, "recipes", name).returncode == 0
    planned = verb(
        installed, tmp_path, "plan", "internvl2_2b_32k.yaml", "--gpus", "32", "--arch", "2B", "--json"
    )
    assert planned.returncode == 0, planned.stderr
    json.loads(planned.stdout)
    submit = installed / "megatron_v2pe" / "launch" / "submit.py"
    command = [sys.executable, str(submit), "cpu_venv.yaml", "--dry-run", "train", "internvl2_2b_32k.yaml"]
    around = {**os.environ, "PYTHONPATH": str(installed)}
    shown = subprocess.run(
        command, cwd=tmp_path, env=around, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert str(submit.parent.parent) in shown.stdout


def test_types_are_advertised(installed):
    assert (installed / "megatron_v2pe" / "py.typed").is_file()
