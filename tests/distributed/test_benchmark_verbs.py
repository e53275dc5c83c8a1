"""evaluate --benchmark with a real checkpoint on one and two ranks: same rows; forced answers, errors, all layouts."""

import json
import random
import signal
import time

import pytest

from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.evaluation.jobs.response_rows import read_rows
from megatron_v2pe.evaluation.jobs.runner import count_lines
from tests.support import benchmark_data as data
from tests.support.tiny import import_golden
from tests.support.warm import run_verb


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return import_golden(tmp_path_factory.mktemp("checkpoint") / "imported")


@pytest.fixture(scope="module")
def niah(tmp_path_factory):
    return data.mm_niah(tmp_path_factory.mktemp("niah"))


def evaluate(checkpoint, folder, out, *more, name="mm-niah", ranks=1, code=0):
    given = ("--benchmark", name, "--data-dir", folder, "--out", out, *more)
    done = run_verb("evaluate", checkpoint, *given, ranks=ranks, variables={"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr[-3000:]
    return done


def answers(out, stride):
    return {name: row.response.text for name, row in read_rows(out, stride).items()}


@pytest.mark.distributed
def test_two_ranks_answer_like_one(checkpoint, niah, tmp_path):
    some = ("--stride", "default,2", "--sets", "retrieval-image,reasoning-text", "--limit", "2")
    one = evaluate(checkpoint, niah, tmp_path / "one", *some).stdout
    two = evaluate(checkpoint, niah, tmp_path / "two", *some, ranks=2).stdout
    split = evaluate(checkpoint, niah, tmp_path / "cp", *some, "--cp", "2", ranks=2).stdout
    assert one == two == split
    assert "stride default" in one
    for stride in ("default", "2"):
        found = answers(tmp_path / "one", stride)
        assert len(found) == 4
        assert answers(tmp_path / "two", stride) == answers(tmp_path / "cp", stride) == found
        assert len(list((tmp_path / "two").glob(f"rows_{stride}.*.jsonl"))) == 2
        assert len(list((tmp_path / "cp").glob(f"rows_{stride}.*.jsonl"))) == 1
    # What one number of ranks began, another continues.
    for path in (tmp_path / "two").glob("rows_2.1.jsonl"):
        path.unlink()
    evaluate(checkpoint, niah, tmp_path / "two", *some)
    assert answers(tmp_path / "two", "2") == answers(tmp_path / "one", "2")
    again = run_verb("score", "mm-niah", tmp_path / "one", "--mode", "clean", "--json")
    assert json.loads(again.stdout)["strides"]["2"]["rows"] == 4
    table = run_verb("paper-table", tmp_path / "one")
    assert "MM-NIAH Avg" in table.stdout


def test_a_forced_answer_has_probabilities(checkpoint, niah, tmp_path):
    some = ("--mode", "forced", "--stride", "2", "--sets", "retrieval-image", "--limit", "1")
    evaluate(checkpoint, niah, tmp_path / "out", *some)
    ((_, row),) = read_jsonl(tmp_path / "out" / "rows_2.0.jsonl")
    assert row["forced_match"] is False
    assert len(row["token_logprobs"]) >= 1
    assert all(value < 0 for value in row["token_logprobs"])
    assert row["n_visual"] % 4 == 0
    assert row["last_position"] < row["n_prompt"]


def test_a_missing_image_is_a_row_with_an_error(checkpoint, tmp_path):
    niah = data.mm_niah(tmp_path / "data")
    (niah / "mm_niah_test" / "images" / "a.png").write_bytes(b"not an image")
    some = ("--stride", "2", "--sets", "retrieval-text", "--limit", "2")
    done = evaluate(checkpoint, niah, tmp_path / "out", *some, code=1)
    assert "2 questions ended with an error" in done.stderr
    assert "a.png: cannot be read as an image" in done.stderr
    data.picture(niah / "mm_niah_test" / "images" / "a.png")
    evaluate(checkpoint, niah, tmp_path / "out", *some, "--retry-errors")


def test_a_damaged_video_is_a_row_with_an_error(checkpoint, tmp_path):
    folder = data.mvbench(tmp_path / "data")
    video = folder / "video" / "star" / "Charades_v1_480" / "a.mp4"
    video.write_bytes(video.read_bytes()[:100])
    evaluate(checkpoint, folder, tmp_path / "out", "--limit", "1", "--stride", "2", name="mvbench", code=1)
    found = read_rows(tmp_path / "out", "2")
    assert "a.mp4" in found["Action Sequence/0"].response.error
    assert found["Episodic Reasoning/0"].response.error is None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(2400)
def test_twenty_kills_and_other_numbers_of_ranks_give_the_same_rows(checkpoint, tmp_path):
    niah = data.mm_niah(tmp_path / "data", per_cell=3)
    given = ("--benchmark", "mm-niah", "--data-dir", niah, "--stride", "2")
    evaluate(checkpoint, niah, tmp_path / "whole", "--stride", "2")
    wanted = answers(tmp_path / "whole", "2")
    out, generator, kills = tmp_path / "out", random.Random(5), 0
    for _ in range(20):
        before, more = count_lines(out, "2"), generator.randint(0, 3)
        # After some more answers, or, with none more, somewhere between the start and the first answer.
        end = time.monotonic() + generator.uniform(0, 4)

        def is_time(lines=before + more, is_timed=more == 0, end=end):
            return time.monotonic() > end if is_timed else count_lines(out, "2") >= lines

        done = run_verb(
            "evaluate", checkpoint, *given, "--out", out, ranks=generator.choice((1, 2)), kill_when=is_time
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
        kills += done.returncode != 0
        assert count_lines(out, "2") >= before
        assert answers(out, "2").items() <= wanted.items()
    assert kills > 10
    evaluate(checkpoint, niah, out, "--stride", "2", ranks=2)
    assert answers(out, "2") == wanted
    assert len(wanted) == 72


@pytest.mark.slow
@pytest.mark.parametrize("name", list(data.DATA))
def test_every_benchmark_goes_all_the_way(checkpoint, tmp_path, name):
    folder = data.DATA[name][0](tmp_path / "data")
    out = tmp_path / "out"
    assert run_verb("check-data", folder, "--benchmark", name).returncode == 0
    evaluate(checkpoint, folder, out, "--stride", "2", "--limit", "1", name=name)
    assert run_verb("score", name, out).returncode == 0
    table = run_verb("paper-table", out, "--out", tmp_path / "table")
    assert table.returncode == 0
    assert "stride 2, mode" in table.stdout
