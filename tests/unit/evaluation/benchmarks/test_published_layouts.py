"""Every benchmark's made-up data in its published layout: requests, checks, an oracle, nothing said, one wrong file."""

import json
from pathlib import Path

import pytest

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.evaluation.benchmarks.base import Response, Row, interleave
from megatron_v2pe.evaluation.benchmarks.registry import BENCHMARKS, find_benchmark
from megatron_v2pe.evaluation.benchmarks.sets.niah_bins import band_of, range_of
from megatron_v2pe.evaluation.jobs.runner import limited, with_files
from tests.support import benchmark_data as data

NAMES = list(BENCHMARKS)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    make, count = data.DATA[request.param]
    return find_benchmark(request.param), make(tmp_path_factory.mktemp(request.param)), count


def rows(benchmark, folder, say):
    return [
        Row(
            response=Response(id=request.id, text=say(request.gold)),
            gold=json.loads(json.dumps(request.gold)),
        )
        for request in benchmark.requests(folder)
    ]


def test_requests_are_complete(case):
    benchmark, folder, count = case
    requests = list(benchmark.requests(folder))
    assert len({request.id for request in requests}) == len(requests) == count
    for request in requests:
        assert request.max_new_tokens > 0
        assert any(part.kind == "text" and part.text for part in request.parts)
        media = [part for part in request.parts if part.kind != "text"]
        assert media
        assert all(part.data or Path(part.path).exists() for part in media)
        assert not any("<image>" in part.text for part in request.parts)


def test_what_is_there_is_counted(case):
    benchmark, folder, count = case
    checks = benchmark.check(folder)
    assert sum(check.count or 0 for check in checks) == count
    assert [check.problem for check in checks if check.count is not None and check.problem] == []


def test_an_oracle_is_right_and_silence_is_not(case):
    benchmark, folder, _ = case
    right = rows(benchmark, folder, lambda gold: data.oracle(benchmark.name, gold))
    silent = rows(benchmark, folder, lambda gold: "")
    for mode in benchmark.modes:
        score = benchmark.score(right, mode)
        # `rouge` adds 1e-8 to its denominator, so that equal texts score a little less than 1.
        assert list(score.rows.values()) == pytest.approx([1.0] * len(score.rows), abs=1e-6)
        assert [cell.mean for cell in score.cells] == pytest.approx([1.0] * len(score.cells), abs=1e-6)
        counted = {name: v for name, v in score.metrics.items() if not name.startswith("yes ")}
        if benchmark.name.startswith("mm-niah"):  # published means count the empty cells of these few samples
            own = "clean mean" if mode != "clean" else "official mean"
            counted = {n: v for n, v in counted.items() if (own in n or "micro" in n) == (mode != "clean")}
            counted |= {n: v for n, v in score.metrics.items() if "micro" in n}
        assert list(counted.values()) == pytest.approx([1.0] * len(counted), abs=1e-6)
    clean = benchmark.score(silent, "clean")
    assert sum(clean.rows.values()) == 0
    assert next(iter(clean.metrics.values())) == 0


def test_the_verb_says_what_is_there(case, capsys):
    benchmark, folder, _ = case
    assert main(["check-data", str(folder), "--benchmark", benchmark.name]) == 0
    out = capsys.readouterr().out
    assert f"({benchmark.name})" in out
    assert " questions" in out


def test_check_data_of_an_empty_folder(tmp_path, capsys):
    assert main(["check-data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"({name}): 0 of " in out for name in NAMES)
    assert out.count("download: ") == len(NAMES)
    assert main(["check-data", str(tmp_path), "--benchmark", "pope"]) == 1
    assert main(["check-data", str(tmp_path / "none")]) == 2


# Benchmark, annotation, what to change in its first record, what the message says.
WRONG = [
    ("mm-niah", "mm_niah_test/annotations/retrieval-text.jsonl", ("context",), 5, r"jsonl:1: context is 5"),
    ("mm-niah", "mm_niah_test/annotations/counting-text.jsonl", ("answer",), "x", "must be a list"),
    (
        "mm-niah",
        "mm_niah_test/annotations/retrieval-text.jsonl",
        ("images_list",),
        ["../b.png"],
        "leads out of",
    ),
    (
        "mm-niah",
        "mm_niah_test/annotations/retrieval-text.jsonl",
        ("images_list",),
        [],
        "1 times <image> for 0",
    ),
    (
        "long-vqa",
        "long_vqa_32k/val_long_vqa_svqa_16_32.jsonl",
        ("conversations",),
        [],
        "the question and the answer",
    ),
    (
        "milebench",
        "ALFRED/ALFRED.json",
        ("data", 0, "task_instruction_id"),
        9,
        r"data\[0\]: task_instruction_id is 9",
    ),
    ("chartqa", "chartqa/test_human.jsonl", ("answer",), None, "answer is None"),
    ("docvqa", "docvqa/val.jsonl", ("question_id",), 99, "question_id 99 has no answers"),
    (
        "scienceqa",
        "scienceqa/scienceqa_test_img.jsonl",
        ("answer",),
        4,
        "answer is 4, but there are 2 choices",
    ),
    ("pope", "pope/llava_pope_test.jsonl", ("category",), "odd", "coco_pope_odd.json: cannot be read"),
    ("seed-i", "SEED/seed.jsonl", ("question_id",), 77, "question_id '77' is not in"),
    ("mvbench", "json/action_sequence.json", (0, "answer"), "flies", "'flies' is not among candidates"),
    ("mmlongbench", "mmlb_data/vrag/viquae_K8_dep6.jsonl", ("ctxs",), [{"title": 1}], "title is 1"),
]


@pytest.mark.parametrize(("name", "file", "keys", "value", "message"), WRONG)
def test_a_wrong_record_is_named(tmp_path, name, file, keys, value, message):
    folder = data.DATA[name][0](tmp_path)
    path = folder / file
    is_lines = path.suffix == ".jsonl"
    content = (
        [json.loads(line) for line in path.read_text().splitlines()]
        if is_lines
        else json.loads(path.read_text())
    )
    *outer, last = keys
    target = content[0] if is_lines else content
    for key in outer:
        target = target[key]
    target[last] = value
    if is_lines:
        data.lines(path, content)
    else:
        data.whole(path, content)
    with pytest.raises(DataError, match=message) as caught:
        list(find_benchmark(name).requests(folder))
    assert str(folder.resolve()) in str(caught.value) or str(folder) in str(caught.value)
    problems = [check.problem for check in find_benchmark(name).check(folder) if check.count is not None]
    assert sum(bool(problem) for problem in problems) == 1


def test_a_missing_image_is_named_by_the_check(tmp_path, capsys):
    folder = data.mm_niah(tmp_path)
    (folder / "mm_niah_test" / "images" / "a.png").unlink()
    assert main(["check-data", str(folder), "--benchmark", "mm-niah"]) == 1
    assert "retrieval-text/0: no such file: " in capsys.readouterr().out


def test_sets_limits_and_forced_answers(tmp_path):
    folder = data.mm_niah(tmp_path)
    benchmark = find_benchmark("mm-niah")
    some = list(benchmark.requests(folder, sets=("counting-image", "retrieval-image"), forced=True))
    assert [request.forced_answer for request in some] == ["B"] * 4 + ["[1, 2]"] * 4
    assert len(list(limited(benchmark.requests(folder), 1))) == 6
    with pytest.raises(ConfigError, match="'counting' is no set of mm-niah"):
        list(benchmark.requests(folder, sets=("counting",)))
    with pytest.raises(ConfigError, match="MVBench has no forced answers"):
        list(find_benchmark("mvbench").requests(folder, forced=True))
    with pytest.raises(DataError, match=r"has no file .*; download OpenGVLab/MM-NIAH"):
        list(benchmark.requests(tmp_path / "images"))


def test_prompts_are_those_of_the_release(tmp_path):
    folder = data.mm_niah(tmp_path)
    benchmark = find_benchmark("mm-niah")

    def asked(task):
        request = next(iter(benchmark.requests(folder, sets=(task,))))
        return "".join(part.text if part.kind == "text" else "<image>" for part in request.parts), request

    text, request = asked("retrieval-text")
    assert text == (
        "A page. <image> more text. Which one?\nAnswer the question using a single word or phrase."
    )
    assert (request.max_tiles, request.max_new_tokens) == (5, 16)
    assert asked("counting-text")[0].endswith("Which one?")
    assert asked("counting-text")[1].max_new_tokens == 320
    text, _ = asked("retrieval-image")
    assert text.endswith(
        "Which one?\nA. cat\nB. dog\nC. owl\nD. fox\nAnswer with the option's letter from the given choices directly."
    )
    assert "\nA. <image>\nB. <image>\nAnswer with" in asked("reasoning-image")[0]


def test_images_of_annotation_files_become_files(tmp_path):
    folder = data.mmmu(tmp_path / "data")
    requests = [
        with_files(request, tmp_path / "images", is_writer=True)
        for request in find_benchmark("mmmu-val").requests(folder)
    ]
    from PIL import Image

    first, second = [part for part in requests[0].parts if part.kind == "image"]
    assert Image.open(first.path).size == (224, 224), "the first image of a question is enlarged twice"
    assert Image.open(second.path).size == (112, 112)
    assert second.max_tiles == 1


@pytest.mark.parametrize(
    ("length", "index"), [(999, -1), (1000, 0), (1999, 0), (2000, 1), (63999, 9), (64000, 10), (72000, 10)]
)
def test_ranges_of_length(length, index):
    assert range_of(length, find_benchmark("mm-niah").lengths) == index


@pytest.mark.parametrize(
    ("depth", "band"), [(0.0, 0), (0.2, 1), (0.6, 2), (0.99, 4), (1.0, 4), ([0.1, 0.9], 2), ([1.0, 1.0], 4)]
)
def test_bands_of_depth(depth, band):
    assert band_of(depth) == band


def test_an_empty_cell_counts_as_zero_only_where_it_was_published_so(tmp_path):
    benchmark = find_benchmark("mm-niah")
    right = rows(benchmark, data.mm_niah(tmp_path), lambda gold: data.oracle("mm-niah", gold))
    official, clean = benchmark.score(right, "release"), benchmark.score(right, "clean")
    # Two of eleven lengths, in each two of five bands (one where several needles lie at one depth).
    assert official.metrics["retrieval-text"] == pytest.approx(2 / 11 * 2 / 5)
    assert clean.metrics["retrieval-text"] == 1
    assert official.metrics["Avg"] == pytest.approx(2 / 11 * 2 / 5)


def test_parts_and_placeholders_agree():
    assert [part.kind for part in interleave("a <image> b<image>", ["x", "y"])] == [
        "text",
        "image",
        "text",
        "image",
    ]
    with pytest.raises(ValueError, match="2 times <image> for 1 images"):
        interleave("<image><image>", ["x"])
