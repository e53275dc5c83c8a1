"""`runs`: numbers of a run folder whose steps are known, a comparison, curves, and folders that are no runs."""

import json

import pytest

from megatron_v2pe.cli.main import main
from megatron_v2pe.evaluation.runs import summarize


def write_run(folder, losses, *, slow=()):
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step, loss in enumerate(losses, start=1):
            seconds = 9.0 if step in slow else 1.0
            line = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "tokens": 100}
            file.write(json.dumps({**line, "tokens_per_s": 50.0, "step_s": seconds, "data_s": 0.5}) + "\n")
    return folder


@pytest.fixture
def run_dir(tmp_path):
    """Six steps: the third not applied, the fifth slow; two starts, one hang, one finished checkpoint."""
    folder = write_run(tmp_path / "a", [3.0, 2.0, None, 1.5, 1.25, 1.75], slow={5})
    (folder / "bad_steps.jsonl").write_text('{"step": 3}\n{"step": 3}\n')
    (folder / "starts.jsonl").write_text('{"step": 0}\n{"step": 2}\n')
    (folder / "stacks").mkdir()
    (folder / "stacks" / "rank_12.txt").write_text("hung")
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000004" / "checkpoint.json").write_text("{}")
    (folder / "checkpoints" / "step_00000006").mkdir()  # not finished
    return folder


def test_the_summary_names_what_happened(run_dir):
    found = summarize(run_dir)
    assert (found.stalls, found.bad_steps, found.stacks) == ((5,), (3,), (12,))
    assert (found.checkpoints, found.starts) == ((4,), (0, 2))
    rows = found.rows()
    assert (rows["loss first"], rows["loss last"]) == ("3.0000", "1.7500")
    assert rows["loss lowest"] == "1.2500 at step 5"
    assert rows["tokens"] == "600"
    assert rows["time in steps"] == "17.0 s, 17.6 % of it waiting for data"


def test_two_runs_are_compared_and_drawn(run_dir, tmp_path, capsys):
    other = write_run(tmp_path / "b", [3.0, 2.0, None, 1.0])
    assert main(["runs", str(run_dir), str(other), "--out", str(tmp_path / "curves.png")]) == 0
    assert "differ at 1 of 4 steps, first at step 4; largest difference 0.5" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["runs", str(run_dir), str(run_dir)]) == 0
    assert "equal to the bit at all 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: cannot be read"),
        ("", "holds no step"),
        ('{"step": 1}\n', "metrics.jsonl:1: not a line of training metrics, it lacks loss"),
    ],
)
def test_folders_that_are_no_runs(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["runs", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_of_another_kind_is_refused(run_dir, capsys):
    assert main(["runs", str(run_dir), "--out", "curves.jpg"]) == 2
    assert "--out is 'curves.jpg', but must end in .png" in capsys.readouterr().err
