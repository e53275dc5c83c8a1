"""The synthetic example: data made by synthesize, trained on and evaluated; a second call has nothing left to do."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def example(*options):
    return subprocess.run(
        ["bash", "examples/synthetic/run.sh", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stesp", "3"], "unknown option '--stesp'"),
        (["--steps"], "--steps needs a value"),
        (["--count", "0"], "'0' must be a whole number"),
    ],
)
def test_bad_options_exit_with_two(options, message):
    done = example(*options)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_inputs_to_a_report(tmp_path):
    options = ["--steps", "2", "--count", "2", "--work", str(tmp_path)]
    first = example(*options)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "26 of 26 records made" in first.stderr
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run_2_2" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    answers = (tmp_path / "run_2_2" / "report" / "predictions_1.jsonl").read_text().splitlines()
    assert len(answers) == 26
    again = example(*options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "0 of 26 records made" in again.stderr
    assert "step 2/2" not in again.stderr
