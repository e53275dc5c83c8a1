"""Hangs as text: ranks that wait, one that is elsewhere, ranks that said nothing, and two hangs of one run."""

import json
import re

import pytest

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.inspection.hangs import read_hangs
from megatron_v2pe.inspection.runs import read_run

WAITING = {"is_waiting": True, "call": "all_reduce", "at": "train/step.py:139 in _mean_loss", "within": ""}
ASLEEP = {
    "is_waiting": False,
    "call": "time.sleep(9)",
    "at": "a.py:1 in f",
    "within": "data/loader.py:2 in g",
}


def write(run_dir, rank, place, *, time, step=7, world_size=4, silent=()):
    (run_dir / "stacks").mkdir(exist_ok=True)
    line = {"rank": rank, "world_size": world_size, "step": step, "seconds": 30.0, "time": time, **place}
    with open(run_dir / "stacks" / f"rank_{rank}.jsonl", "a") as file:
        file.write(json.dumps({**line, "silent": list(silent)}) + "\n")


def test_who_waits_for_whom(tmp_path):
    for rank in (0, 1, 3):
        write(tmp_path, rank, WAITING, time=100.0 + rank)
    write(tmp_path, 2, ASLEEP, time=100.5)
    (hang,) = read_hangs(tmp_path)
    assert str(hang) == (
        "hang at step 7: ranks 0-1, 3 wait in all_reduce (train/step.py:139 in _mean_loss), "
        "rank 2 is elsewhere, at time.sleep(9) (a.py:1 in f, from data/loader.py:2 in g)"
    )


def test_silent_ranks_are_named_with_their_last_step_where_it_is_known(tmp_path):
    last = {"rank": 1, "host": "n2", "step": 6, "seconds": 44.0}
    restarted = {"rank": 0, "host": "n1", "step": 6, "seconds": 44.0}  # spoke all the same
    write(tmp_path, 0, WAITING, time=100.0, world_size=3, silent=[last, restarted])
    (hang,) = read_hangs(tmp_path)
    assert str(hang).endswith(
        "_mean_loss), rank 1 is silent, last heard of in step 6 on n2, rank 2 is silent"
    )


def test_many_silent_ranks_are_counted(tmp_path):
    write(tmp_path, 0, WAITING, time=100.0, world_size=9)
    assert str(read_hangs(tmp_path)[0]).endswith("rank 4 is silent, 4 more are silent")


def test_a_hang_after_a_restart_is_another_one(tmp_path):
    for time, step in ((100.0, 7), (200.0, 9)):
        write(tmp_path, 0, WAITING, time=time, step=step, world_size=2)
        write(tmp_path, 1, WAITING, time=time + 2, step=step, world_size=2)
    assert [(hang.step, hang.silent) for hang in read_hangs(tmp_path)] == [(7, {}), (9, {})]


def test_runs_shows_a_line_for_each_hang(tmp_path, capsys):
    write(tmp_path, 0, WAITING, time=100.0, world_size=1)
    with pytest.raises(DataError, match=r"did the run start\?|cannot be read(.|\n)*hang at step 7"):
        read_run(tmp_path)  # it hung before its first step was done
    metrics = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "tokens": 5, "tokens_per_s": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**metrics, "step_s": 1.0, "data_s": 0.1}) + "\n")
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^hangs +1: step 7$", shown, re.M)
    assert "\nhang at step 7: rank 0 waits in all_reduce (train/step.py:139 in _mean_loss)\n" in shown
