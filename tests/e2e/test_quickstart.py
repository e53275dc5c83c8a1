"""Scripts of the quickstart and of the ablation in a few steps; a second call has nothing left to do."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def example(name, work, *options):
    command = ["bash", f"examples/{name}/run.sh", "--steps", "2", "--eval-share", "0.01", *options]
    return subprocess.run(
        [*command, "--work", str(work)], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


def written(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_both_scripts_run_and_skip_what_is_done(tmp_path):
    work = tmp_path / "work"
    first = example("quickstart", work)
    assert first.returncode == 0, first.stderr[-3000:]
    run = work / "seed_0" / "random_2"
    assert first.stdout.splitlines()[-1] == f"Exported checkpoint: {run}/exported"
    assert (run / "exported" / "model.safetensors").stat().st_size > 3e6
    assert json.loads((run / "exported" / "config.json").read_text())["rope_pos_id_version"] == "v2pe_rnd"
    report = {path.name for path in (run / "report").iterdir()}
    pictures = {f"heatmap_{stride}.png" for stride in ("default", "8", "1")}
    assert pictures | {"table.txt", "cells.csv", "loss.png", "accuracy_by_length.png"} <= report
    assert {"seeds.txt", "seeds.csv", "seeds.png"} <= {path.name for path in work.iterdir()}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    before = written(run)
    second = example("quickstart", work)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "step 2/2" in first.stderr
    assert "step 2/2" not in second.stderr
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]

    # The ablation continues in the quickstart's folder: one model of two is there.
    third = example("ablation", work, "--seeds", "0", "--models", "random,fixed_1", "--ranks", "1")
    assert third.returncode == 0, third.stderr[-3000:]
    assert written(run) == before
    trained = (work / "seed_0" / "fixed_1_2" / "config.yaml").read_text()
    assert "mode: v2pe_fixed" in trained
    assert "stride: 1\n" in trained
    table = (work / "ablation.txt").read_text()
    assert all(f"{name} " in table for name in ("random", "fixed 1/64", "64/64 (default)"))
    assert len((work / "ablation.csv").read_text().splitlines()) == 1 + 2 * 3 * 5
    assert (work / "ablation.png").exists()


@pytest.mark.slow
def test_fresh_never_removes_a_foreign_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    done = example("quickstart", tmp_path / "mine", "--fresh")
    assert done.returncode == 2
    assert "was not made by this script" in done.stderr
    assert (tmp_path / "mine" / "thesis.tex").exists()
