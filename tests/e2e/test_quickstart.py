"""The quickstart's script from nothing to pictures, in a few steps; a second call has nothing left to do."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def quickstart(work, *options):
    command = ["bash", "examples/quickstart/run.sh", "--steps", "2", "--eval-share", "0.01", *options]
    return subprocess.run(
        [*command, "--work", str(work)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_runs_and_a_second_call_skips_what_is_done(tmp_path):
    work = tmp_path / "work"
    first = quickstart(work)
    assert first.returncode == 0, first.stderr[-3000:]
    run = work / "run_2"
    assert first.stdout.splitlines()[-1] == f"Exported checkpoint: {run}/exported"
    assert (run / "exported" / "model.safetensors").stat().st_size > 4e6
    assert json.loads((run / "exported" / "config.json").read_text())["rope_pos_id_version"] == "v2pe_rnd"
    report = {path.name for path in (run / "report").iterdir()}
    pictures = {f"heatmap_{stride}.png" for stride in ("default", "2", "1")}
    assert pictures | {"table.txt", "cells.csv", "loss.png", "accuracy_by_length.png"} <= report
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    written = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    second = quickstart(work)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "step 2/2" in first.stderr
    assert "step 2/2" not in second.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == written
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.slow
def test_fresh_never_removes_a_foreign_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    done = quickstart(tmp_path / "mine", "--fresh")
    assert done.returncode == 2
    assert "was not made by this script" in done.stderr
    assert (tmp_path / "mine" / "thesis.tex").exists()
