"""MMLongBench's readings: hand cases of each, and the means of its categories."""

import math

import pytest

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.benchmarks.base import Response, Row
from megatron_v2pe.evaluation.benchmarks.registry import find_benchmark
from megatron_v2pe.evaluation.metrics.long_documents import (
    class_number,
    contains,
    document_answer,
    letter,
    same_sum,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "answer", "kind", "score"),
    [
        ("There are 1,200 of them.", "1200", "Integer", 1),
        ("12 or 13", "13", "Integer", 1),
        ("12.5", "12", "Integer", 0),
        ("", "12", "Integer", 0),
        ("0.253", "25.2%", "Float", 1),
        ("25.9%", "25.2%", "Float", 0),
        ("$3.50 million", "3.5", "Float", 1),
        ("the Red owl.", "red owl", "String", 1),
        ("an owl", "red owl", "String", 2 / 3),
        ("a cat", "red owl", "String", 0),
        ("", "red owl", "String", 0),
        ("see page 12", "page 12", "String", 1),
        ("on Page 12", "page 12", "String", 0),
        ("on 2019-05-04", "2019-05-04", "String", 1),
        ("Not answerable.", "Not answerable", "None", 1),
        ("owl, cat, 7", '["owl", "7", "cat"]', "List", (0.8 + 1) / 2),
        ("7", '["owl", "7"]', "List", 0.5),
        ("owl", "[3, 2.5]", "List", 0),
    ],
)
def test_answers_about_documents(text, answer, kind, score):
    assert document_answer(text, answer, kind) == pytest.approx(score)


def test_an_unknown_kind_of_answer_is_refused():
    with pytest.raises(ValueError, match="answer_format is 'Date'"):
        document_answer("x", "y", "Date")


def test_the_other_readings():
    assert contains("It is The Owl!", ["cat", "owl"]) == 1
    assert contains("owls", "a bowl") == 0
    assert [same_sum(text, [2, 3]) for text in ("[5]", "[2, 3]", "2 and 3", "[2]", "")] == [1, 1, 1, 0, 0]
    assert [letter(text, 1) for text in ("Answer:B. not A", "the answer is (B)", "A, no, B", "(A)", "")] == [
        *(1, 1, 1),
        *(0, 0),
    ]
    assert [
        class_number(text, 12) for text in ("label: 12", "label:3, not 12", "of 3: 12", "twelve", "")
    ] == [
        *(1, 0, 1),
        *(0, 0),
    ]
    assert [yes_or_no(text, "Yes", default=0) for text in ("Yes.", "no... yes", "No", "maybe")] == [
        1,
        1,
        0,
        0,
    ]
    assert yes_or_no("maybe", "Yes", default=1) == 1
    assert yes_or_no("maybe", "no") == yes_or_no("maybe", "yes") == 0


def row(name, length, text, **gold):
    gold = {"set": name, "length": length, "answer": "owl", "depth": None, **gold}
    return Row(response=Response(id=f"{name}@{length}-{text}", text=text), gold=gold)


def test_the_mean_of_needles_has_five_parts_at_each_length():
    rows = [
        row("retrieval-text", 8, "owl"),
        row("retrieval-image", 8, "A", answer=1),
        row("counting-text", 8, "[3]", answer=[1, 2]),
        row("vh_single", 8, "No", answer="Yes", default=1),
        row("retrieval-text", 16, "owl"),
    ]
    score = find_benchmark("mmlongbench").score(rows, "original")
    # 8K: retrieval (1 + 0) / 2, counting 1, vh_single 0; 16K: retrieval 1.
    assert score.metrics["NIAH"] == pytest.approx(((0.5 + 1 + 0) / 3 + 1) / 2)
    assert score.by_length["retrieval-text"] == [1, 1]
    assert math.isnan(score.by_length["vh_single"][1])
    assert "reasoning-image" in score.notes[1]


def test_summaries_are_refused_and_missed_by_name(tmp_path):
    from tests.support.benchmark_data import lines, mmlongbench

    folder, benchmark = mmlongbench(tmp_path), find_benchmark("mmlongbench")
    lines(folder / "mmlb_data" / "summ" / "gov_K8.jsonl", [{"id": "s", "question": "Sum up.", "answer": "x"}])
    with pytest.raises(ConfigError, match=r"'gov-report@8k' of mmlongbench is not asked.*GPT-4o"):
        list(benchmark.requests(folder, sets=("viquae@8k", "gov-report@8k")))
    assert len(list(benchmark.requests(folder))) == 11, "all that is there does not include them"
    (note,) = (
        n for n in benchmark.score([row("viquae", 8, "owl")], "original").notes if "without the sets gov" in n
    )
    assert "gov-report, multi-lexsum" in note
    assert "GPT-4o" in note


def test_the_prompts_last_word_is_put_before_the_answer():
    benchmark = find_benchmark("mmlongbench")
    answers = [row("retrieval-image", 8, "B. because A is no owl", answer=1), row("viquae", 8, "Answer: Owl")]
    for mode in ("original", "clean"):
        assert list(benchmark.score(answers, mode).rows.values()) == [1, 1]
    silent = [row("vh_multi", 8, "", answer="Yes", default=1)]
    assert list(benchmark.score(silent, "original").rows.values()) == [1], "as published: a default counts"
    assert list(benchmark.score(silent, "clean").rows.values()) == [0]


def test_examples_are_drawn_by_question(tmp_path):
    from tests.support.benchmark_data import mmlongbench

    folder = mmlongbench(tmp_path)
    asked = [
        [request for request in find_benchmark("mmlongbench").requests(folder) if "food101" in request.id]
        for _ in range(2)
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 2
    for request in asked[0]:
        assert [part.kind for part in request.parts].count("image") == 3
        text = "".join(part.text for part in request.parts)
        assert {"label: 3", "label: 4"} <= set(text.split("\n"))
        assert text.endswith("Now classify this image: \nlabel:")
