"""`runs`: numbers of a run folder whose steps are known, a comparison, curves, and folders that are no runs."""

import json

import numpy as np
import pytest

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.inspection.run_curves import moving_mean, write_loss_curve
from megatron_v2pe.inspection.run_table import run_rows, runs_table, stragglers
from megatron_v2pe.inspection.runs import read_run


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
    found = read_run(run_dir)
    assert (found.stalls, found.bad_steps, found.stacks) == ((5,), (3,), (12,))
    assert (found.checkpoints, found.starts) == ((4,), (0, 2))
    rows = run_rows(found)
    assert rows["loss"] == "3.0000 -> 1.7500, lowest 1.2500 at step 5"
    assert rows["tokens"] == "600"
    assert rows["time in steps"] == "17.0 s, 17.6 % waiting for data"
    assert (rows["stragglers"], rows["memory"], rows["packs"]) == ("not recorded",) * 3  # by an older version


def test_two_runs_are_compared_and_drawn(run_dir, tmp_path, capsys):
    other = write_run(tmp_path / "b", [3.0, 2.0, None, 1.0])
    assert main(["runs", str(run_dir), str(other), "--out", str(tmp_path / "curves.png")]) == 0
    assert "differ at 1 of 4 steps, first at step 4; largest difference 0.5" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["runs", str(run_dir), str(run_dir)]) == 0
    assert "equal to the bit at all 6 steps" in capsys.readouterr().out


def measured(step, *, losses, straggler=None):
    """What a line of the present version has beyond those of `write_run`."""
    share = 1 / len(losses)
    return {
        "loss_by_source": losses,
        "weight_by_source": dict.fromkeys(losses, share),
        "comm_wait_s_min": 0.1,
        "comm_wait_s_max": 0.1 if straggler is None else 0.6,
        "straggler": straggler,
        "straggler_s": None if straggler is None else 0.5,
        "save_s": 0.5 if step == 2 else 0.0,
        "peak_mem_gib": 1.0 + step,
        "peak_mem_rank": 3,
        "reserved_mem_gib": None,
    }


@pytest.fixture
def measured_dir(tmp_path):
    """Three steps: data set b is not in the first, rank 2 slow in the others."""
    folder = write_run(tmp_path / "measured", [3.0, 2.0, 1.0])
    path = folder / "metrics.jsonl"
    more = [
        measured(1, losses={"a": 3.0}),
        measured(2, losses={"a": 1.0, "b": 3.0}, straggler=2),
        measured(3, losses={"a": 1.5, "b": None}, straggler=2),
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | new) + "\n" for line, new in zip(lines, more, strict=True)))
    return folder


def test_data_sets_stragglers_and_memory_have_rows(measured_dir):
    rows = run_rows(read_run(measured_dir))
    assert rows["  of a"] == "3.0000 -> 1.5000, 80.0 % of weight, 3 of 3 steps"
    assert rows["  of b"] == "3.0000 -> 3.0000, 20.0 % of weight, 1 of 3 steps"
    assert rows["stragglers"] == "rank 2 in 2 of 3 steps, 1.0 s"
    assert rows["memory"] == "at most 4.0 GiB (rank 3)"
    assert rows["time in steps"] == "4.5 s, 33.3 % waiting for data, 6.7 % to 28.9 % in communication"
    assert rows["blocked by saves"] == "0.5 s, 10.0 % of the time; without the last save"


def test_a_data_set_of_one_run_alone_has_a_row_in_its_place(run_dir, measured_dir, tmp_path, capsys):
    assert main(["runs", str(run_dir), str(measured_dir), "--out", str(tmp_path / "curves.png")]) == 0
    labels = [
        line.split("  ")[0] if line[0] != " " else line[2:6] for line in capsys.readouterr().out.splitlines()
    ]
    assert labels[2:6] == ["loss", "of a", "of b", "tokens"]


def test_a_data_set_that_only_the_other_run_shows_is_marked_so(run_dir, measured_dir):
    many = measured(1, losses={f"set{number:02}": 1.0 for number in range(13)})
    path = run_dir / "metrics.jsonl"
    lines = [json.dumps(json.loads(line) | many) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    text = {
        line[:12].strip(): line
        for line in runs_table([read_run(run_dir), read_run(measured_dir)]).splitlines()
    }
    assert "among others" in text["of a"]
    assert "1 more data set, in" in text["others"]
    assert text["of set00"].rstrip().endswith("none")


def test_moving_means_are_centred_and_fewer_at_the_ends():
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2.0, 6.0, 0.0]), window=3), [1.5, 3.0, 8 / 3, 3.0])
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2.0]), window=1), [1.0, 2.0])


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


def test_the_loss_curve_is_drawn_from_metrics(tmp_path):
    from matplotlib.image import imread

    metrics = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "loss": 5.0 / n, "lr": 1e-3, "samples": 1} for n in range(1, 50)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_loss_curve(tmp_path / "loss.png", metrics)
    image = imread(tmp_path / "loss.png")[..., :3]
    blue = np.array([0x1F, 0x77, 0xB4]) / 255
    for half in np.array_split(image, 2, axis=1):  # loss, learning rate
        assert (np.abs(half - blue).max(axis=-1) < 0.02).mean() > 0.001


@pytest.mark.parametrize(("text", "message"), [("", "no step"), ('{"step": 1}\n', r"m\.jsonl:1")])
def test_metrics_without_steps_are_refused(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        write_loss_curve(tmp_path / "loss.png", tmp_path / "m.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        write_loss_curve(tmp_path / "loss.png", tmp_path / "none.jsonl")


def test_a_rank_that_is_slow_again_and_again_is_marked():
    lines = [
        {
            "step": step,
            "comm_wait_s_max": 0.6,
            "straggler": rank,
            "straggler_s": 0.5,
            "step_s": 1.0,
            "data_s": 0.5,
        }
        for step, rank in enumerate([2] * 29 + [7, 2], start=1)
    ]
    assert stragglers(lines) == (
        "rank 2 in 30 of 31 steps, 15.0 s (slow, noticed in steps 1 to 30); rank 7 in 1 of 31 steps, 0.5 s"
    )
