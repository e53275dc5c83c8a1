"""Rows that survive, with stand-in models: torn lines, kills, other numbers of replicas, changed data."""

import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.evaluation.benchmarks.base import Response
from megatron_v2pe.evaluation.benchmarks.registry import find_benchmark
from megatron_v2pe.evaluation.jobs import job as benchmark_job
from megatron_v2pe.evaluation.jobs import pictures, report
from megatron_v2pe.evaluation.jobs.eta import TimeLeft, fit_seconds
from megatron_v2pe.evaluation.jobs.job import JobOptions, run_job
from megatron_v2pe.evaluation.jobs.response_rows import read_rows
from megatron_v2pe.evaluation.jobs.runner import BrokenReplicaError, Work, answer_all
from megatron_v2pe.evaluation.retrieval.questions import Share, parse_strides
from tests.support import benchmark_data as data


class StandIn:
    """Answers by a function of the request; one replica of several."""

    def __init__(self, say, *, share=None, seconds=0.0):
        self.say, self.share, self.seconds, self.asked = say, share or Share(), seconds, []

    def prepare(self, setting):
        return self.share

    def answer(self, request, setting):
        self.asked.append(request.id)
        time.sleep(self.seconds)
        said = self.say(request)
        return (
            said if isinstance(said, Response) else Response(id=request.id, text=said, seconds=self.seconds)
        )

    def close(self):
        pass


def oracle(request):
    return data.oracle("mm-niah", request.gold)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes most of the time of these tests; one of them draws."""
    if "whole_job" not in request.node.name:
        monkeypatch.setattr(benchmark_job, "draw", lambda *args, **options: None)


@pytest.fixture
def niah(tmp_path):
    return data.mm_niah(tmp_path / "data")


def options(niah, out, **changes):
    checkpoint = out.parent / "checkpoint"
    if not checkpoint.exists():
        checkpoint.mkdir()
        (checkpoint / "checkpoint.json").write_text("{}")
    base = JobOptions(
        checkpoint=checkpoint,
        data_dir=niah,
        out=out,
        sets=(),
        limit=0,
        is_forced=False,
        retry_errors=False,
        settings="stand-in",
        mode="clean",
        is_first=True,
        trained_length=4096,
        tokens_per_tile=4,
    )
    return replace(base, **changes)


def run(niah, out, answerer, strides="2", **changes):
    settings = parse_strides(strides, tokens_per_tile=4)
    return run_job(find_benchmark("mm-niah"), settings, answerer, options(niah, out, **changes))


def rows(out, stride="2"):
    return {name: row.response.text for name, row in read_rows(out, stride).items()}


def test_a_whole_job(niah, tmp_path):
    out = tmp_path / "out"
    text, scores = run(niah, out, StandIn(oracle), "default,2")
    assert "Avg" in text
    assert [item.name for item in scores] == ["default", "2"]
    assert all(item.is_complete and item.score.metrics["Avg"] == 1 for item in scores)
    made = {path.name for path in out.iterdir()}
    assert made >= {
        "benchmark.json",
        "rows_2.0.jsonl",
        "scores.json",
        "cells.csv",
        "table.txt",
        "heatmap_2.png",
        "heatmap_default.png",
        "accuracy_by_length.png",
        "stride_sweep.png",
    }
    again = StandIn(oracle)
    run(niah, out, again, "default,2")
    assert again.asked == []


def remembers(tokens):
    """A model that knows what lies within the last `tokens` of a document, and nothing else."""

    def say(request):
        depth = request.gold["placed_depth"]
        depth = depth[0] if isinstance(depth, list) else depth
        is_near = (1 - depth) * request.gold["context_length"] <= tokens
        return oracle(request) if is_near else "no idea at all"

    return say


def test_a_model_that_remembers_the_tail_makes_a_staircase(tmp_path, monkeypatch):
    niah = tmp_path / "data"
    places = [(length, depth) for length in (1500, 3000, 6000) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]
    data.picture(niah / "mm_niah_test" / "images" / "a.png")
    for task, answer in (("retrieval-text", "banana"), ("counting-text", [1, 2])):
        records = [
            data.needle(n, answer=answer, length=length, depth=[depth])
            for n, (length, depth) in enumerate(places)
        ]
        data.lines(niah / "mm_niah_test" / "annotations" / f"{task}.jsonl", records)
    _, (score,) = run(niah, tmp_path / "out", StandIn(remembers(1200)))
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    cells, lengths = score.score.cells, score.score.lengths
    pictures.write_heat_maps(tmp_path / "map.png", cells, lengths=lengths, title="", trained_length=0)
    shown = [lengths.index(length) for length in (1000, 2000, 4000)]
    panels = [axes for axes in figures[0].axes if axes.get_title().startswith(("retrieval", "counting"))]
    assert len(panels) == 2
    for panel in panels:
        # The start of a document is on top, short documents are on the left.
        assert [text.get_text() for text in panel.get_yticklabels()] == ["0", "0.2", "0.4", "0.6", "0.8"]
        assert panel.images[0].origin == "upper"
        assert panel.images[0].get_array()[:, shown].tolist() == [
            [0, 0, 0],
            [1, 0, 0],
            [1, 0, 0],
            [1, 1, 0],
            [1, 1, 1],
        ]


def test_blind_answers_are_right_by_chance_only(tmp_path):
    niah = tmp_path / "data"
    generator = random.Random(11)
    data.picture(niah / "mm_niah_test" / "images" / "a.png")
    for task in ("retrieval-image", "reasoning-image"):
        more = {"choices": list("wxyz")} if task == "retrieval-image" else {"pictures": ["a.png"] * 4}
        records = [
            data.needle(n, answer=generator.randrange(4), length=1500, depth=0.5, **more) for n in range(200)
        ]
        data.lines(niah / "mm_niah_test" / "annotations" / f"{task}.jsonl", records)
    for text, chance in ((lambda _: generator.choice("ABCD"), 0.25), (lambda _: "no idea at all", 0.0)):
        _, (score,) = run(niah, tmp_path / f"out_{chance}", StandIn(text))
        values = list(score.score.rows.values())
        assert len(values) == 400
        # Four standard deviations of 400 answers, of which each is right with that chance.
        assert sum(values) / 400 == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 400) ** 0.5)


def test_a_torn_line_is_asked_again(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    path = out / "rows_2.0.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-25])
    again = StandIn(oracle)
    run(niah, out, again)
    assert len(again.asked) == 1
    assert sorted(path.read_bytes().splitlines()) != []
    assert len(rows(out)) == 24


def test_other_numbers_of_replicas_continue(niah, tmp_path):
    out = tmp_path / "out"
    parts = [StandIn(oracle, share=Share(index=n, count=3, is_writer=True)) for n in range(2)]
    settings = parse_strides("2", tokens_per_tile=4)
    requests = list(find_benchmark("mm-niah").requests(niah))
    out.mkdir()
    # Two of three replicas, each with the questions as they were before anybody answered.
    for part in parts:
        folder = tmp_path / f"part{part.share.index}"
        folder.mkdir()
        answer_all(Work(requests=requests, settings=settings, folder=folder, waits=False), part)
        for path in folder.iterdir():
            path.rename(out / path.name)
    assert len(parts[0].asked) == len(parts[1].asked) == 8
    last = StandIn(oracle)
    _, (score,) = run(niah, out, last)
    assert set(last.asked) == {request.id for request in requests} - set(parts[0].asked) - set(parts[1].asked)
    assert score.is_complete
    assert len(rows(out)) == 24


class Mortal(StandIn):
    """A replica in a process of its own, which it kills -9 when it is asked once more than `answers` times."""

    def __init__(self, share, everybody, answers):
        super().__init__(oracle, share=share)
        self.everybody, self.answers = everybody, answers

    def prepare(self, setting):
        self.everybody.wait(30)
        return self.share

    def answer(self, request, setting):
        if len(self.asked) >= self.answers:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(request, setting)


def start_replicas(folder, requests, numbers_of_answers):
    """One process for each number; returns their exit codes."""
    context = multiprocessing.get_context("fork")
    count = len(numbers_of_answers)
    everybody = context.Barrier(count)
    settings = parse_strides("2", tokens_per_tile=4)

    def replica(index, answers):
        work = Work(requests=requests, settings=settings, folder=folder, is_first=index == 0, waits=False)
        answer_all(work, Mortal(Share(index=index, count=count), everybody, answers))

    processes = [
        context.Process(target=replica, args=each, daemon=True) for each in enumerate(numbers_of_answers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_twenty_kills_and_other_numbers_of_replicas_leave_the_same_rows(tmp_path):
    niah = data.mm_niah(tmp_path / "data", per_cell=4)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(niah, whole, StandIn(oracle))
    requests = list(find_benchmark("mm-niah").requests(niah))
    out.mkdir()
    generator = random.Random(3)
    counts = [len(rows(out))]
    for _ in range(20):
        numbers = [generator.randint(0, 3) for _ in range(generator.randint(1, 3))]
        codes = start_replicas(out, requests, numbers)
        assert set(codes) <= {0, -signal.SIGKILL}
        assert -signal.SIGKILL in codes
        torn = generator.choice(list(out.glob("rows_2.*.jsonl")) or [out / "rows_2.0.jsonl"])
        with open(torn, "ab") as file:  # of a writer that died in the middle of its line
            file.write(b'{"id": "retrieval-te')
        counts.append(len(rows(out)))
    assert counts == sorted(counts)
    assert 20 < counts[-1] < len(requests) == 96
    assert start_replicas(out, requests, [96, 96]) == [0, 0]
    assert rows(out) == rows(whole)
    _, (score,) = run(niah, out, StandIn(oracle))
    assert score.is_complete
    assert score.score.metrics["Avg"] == 1


def test_a_replica_waits_for_the_rows_of_the_others(niah, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    settings = parse_strides("2", tokens_per_tile=4)
    requests = list(find_benchmark("mm-niah").requests(niah))

    def replica(index, seconds):
        answerer = StandIn(oracle, share=Share(index=index, count=2), seconds=seconds)
        answer_all(Work(requests=requests, settings=settings, folder=out), answerer)
        return len(rows(out))

    with ThreadPoolExecutor(2) as pool:
        slow, fast = pool.submit(replica, 0, 0.05), pool.submit(replica, 1, 0.0)
        assert [slow.result(120), fast.result(120)] == [24, 24], "the fast one saw all rows when it ended"


def test_a_changed_question_is_refused(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    path = niah / "mm_niah_test" / "annotations" / "retrieval-text.jsonl"
    path.write_text(path.read_text().replace("Which one?", "Which two?", 1))
    with pytest.raises(
        ConfigError, match=r"an annotation file is not the same \(.*retrieval-text.jsonl changed\)"
    ):
        run(niah, out, StandIn(oracle))
    requests = list(find_benchmark("mm-niah").requests(niah))
    settings = parse_strides("2", tokens_per_tile=4)
    with pytest.raises(DataError, match=r"the question 'retrieval-text/0' is not the one that was answered"):
        answer_all(Work(requests=requests, settings=settings, folder=out), StandIn(oracle))


def test_a_changed_image_is_refused(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    data.picture(niah / "mm_niah_test" / "images" / "a.png", (56, 56))
    with pytest.raises(DataError, match=r"an image or video of '.*' is not the one that was shown"):
        run(niah, out, StandIn(oracle))


@pytest.mark.parametrize(
    ("changes", "strides", "message"),
    [
        ({}, "4", "the list of strides is not the same"),
        ({"limit": 1}, "2", "limit is not the same"),
        ({"is_forced": True}, "2", "--mode is not the same"),
        ({"settings": "bfloat16"}, "2", "settings is not the same"),
        ({"sets": ("retrieval-text",)}, "2", "sets is not the same"),
    ],
)
def test_another_evaluation_needs_another_folder(niah, tmp_path, changes, strides, message):
    run(niah, tmp_path / "out", StandIn(oracle))
    with pytest.raises(ConfigError, match=message):
        run(niah, tmp_path / "out", StandIn(oracle), strides, **changes)


def test_another_checkpoint_needs_another_folder(niah, tmp_path):
    run(niah, tmp_path / "out", StandIn(oracle))
    (tmp_path / "checkpoint" / "checkpoint.json").write_text('{"step": 2}')
    with pytest.raises(ConfigError, match="the checkpoint is not the same"):
        run(niah, tmp_path / "out", StandIn(oracle))


def test_errors_are_rows_and_never_scored(niah, tmp_path, capsys):
    out = tmp_path / "out"

    def fails(request):
        if request.id == "retrieval-text/2":
            return Response(id=request.id, error="no such image: banana")
        return oracle(request)

    _, (score,) = run(niah, out, StandIn(fails))
    assert score.errors == {"retrieval-text/2": "no such image: banana"}
    assert score.num_rows == 23
    assert "retrieval-text/2" not in score.score.rows
    assert report.problems([score]) == [
        "2: 1 questions ended with an error and are in no number above; the first is retrieval-text/2: no such image: "
        "banana"
    ]
    again = StandIn(oracle)
    run(niah, out, again)
    assert again.asked == [], "an error does not end the evaluation for ever, nor is it asked for ever"
    _, (score,) = run(niah, out, again, retry_errors=True)
    assert again.asked == ["retrieval-text/2"]
    assert score.is_complete


def test_a_replica_that_breaks_leaves_its_question(niah, tmp_path):
    out = tmp_path / "out"

    def breaks(request):
        raise BrokenReplicaError(Response(id=request.id, error="out of memory"))

    with pytest.raises(BrokenReplicaError, match="out of memory"):
        run(niah, out, StandIn(breaks))
    _, (score,) = run(niah, out, StandIn(oracle))
    assert len(score.errors) == 1
    assert not score.missing


def test_two_answers_to_one_question_are_refused_by_name(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    line = json.loads((out / "rows_2.0.jsonl").read_text().splitlines()[0])
    append_json(out / "rows_2.1.jsonl", line)
    with pytest.raises(
        DataError, match=rf"rows_2.1.jsonl:1: id '{line['id']}' was answered at .*rows_2.0.jsonl:1"
    ):
        run(niah, out, StandIn(oracle))


def test_rows_of_other_strides_and_questions_are_refused(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    lines = [json.loads(line) for line in (out / "rows_2.0.jsonl").read_text().splitlines()]
    data.lines(out / "rows_2.0.jsonl", [{**lines[0], "stride": "1"}])
    with pytest.raises(DataError, match="was answered with stride 1, not 2"):
        run(niah, out, StandIn(oracle))
    data.lines(out / "rows_2.0.jsonl", [{**lines[0], "id": "odd"}])
    with pytest.raises(DataError, match="answers 'odd', which is not asked"):
        run(niah, out, StandIn(oracle))
    data.lines(out / "rows_2.0.jsonl", [{"id": "x"}])
    with pytest.raises(DataError, match=r"rows_2.0.jsonl:1: not a row of answers"):
        run(niah, out, StandIn(oracle))


def test_missing_rows_are_counted(niah, tmp_path):
    out = tmp_path / "out"
    run(niah, out, StandIn(oracle))
    kept = (out / "rows_2.0.jsonl").read_text().splitlines()[:20]
    (out / "rows_2.0.jsonl").write_text("\n".join(kept) + "\n")
    (score,) = report.score_folder(find_benchmark("mm-niah"), out, mode="clean")
    assert score.missing == 4
    assert report.problems([score]) == ["2: 4 questions have no answer yet; run `evaluate` again"]


def test_the_time_left_grows_with_the_square_of_the_length():
    assert fit_seconds([10, 20], [2, 5]) == pytest.approx((1, 0.01))
    assert fit_seconds([10, 10], [2, 4]) == (3, 0)
    assert fit_seconds([1, 2], [1, 4]) == pytest.approx((0, 1))
    assert fit_seconds([], []) == (0, 0)
    left = TimeLeft([20, 10, 40])
    assert left.seconds() is None
    left.answered(20, 5)
    left.answered(10, 2)
    assert left.seconds() == pytest.approx(1 + 0.01 * 1600)


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such folder; download OpenGVLab/MM-NIAH"):
        run(tmp_path / "none", tmp_path / "out", StandIn(oracle))
    assert not Path(tmp_path / "out").exists()
