"""Retrieval: reading questions, resuming answers, counting right ones."""

import json

import pytest

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.evaluation.retrieval.questions import (
    Answer,
    Prediction,
    answer_items,
    by_length,
    parse_strides,
    read_items,
    read_predictions,
    score,
)


def record(number, *, length=512, depth=0.5, **changes):
    values = {
        "id": f"q{number}",
        "image": ["a.png"],
        "conversations": [
            {"from": "human", "value": "see <image> Which?"},
            {"from": "gpt", "value": str(number % 10)},
        ],
        "length": length,
        "depth": depth,
    }
    return {**values, **changes}


def write(path, records):
    path.write_text("".join(json.dumps(values) + "\n" for values in records))
    return path


class Oracle:
    """Knows every answer, except of documents longer than it remembers."""

    def __init__(self, memory=10**9):
        self.memory, self.asked = memory, []

    def answer(self, item, setting):
        self.asked.append((item.item_id, setting.stride))
        return Answer(text=f" {item.answer}\n" if item.length <= self.memory else "none")


def ask(items, path, answerer):
    (setting,) = parse_strides("1", tokens_per_tile=4)
    seen = []
    answer_items(items, setting=setting, answerer=answerer, predictions_path=path, on_answer=seen.append)
    assert [p.id for p in seen] == [values["id"] for _, values in read_jsonl(path)][-len(seen) :]
    found = read_predictions(path, items)
    return [found[item.item_id] for item in items]


def test_strides_are_read_as_written():
    default, one, four = parse_strides("default, 1,4", tokens_per_tile=4)
    assert (default.name, default.mode, default.stride) == ("default", "default", 4)
    assert (one.name, one.mode, one.stride) == ("1", "v2pe_fixed", 1)
    assert (four.mode, four.stride) == ("v2pe_fixed", 4)


@pytest.mark.parametrize("text", ["", "0", "5", "1,x", "1.5", "-1", "1,1", "1,01", "default,default"])
def test_bad_strides_are_refused(text):
    with pytest.raises(ConfigError, match="--strides"):
        parse_strides(text, tokens_per_tile=4)


def test_the_expected_answer_is_not_in_the_question(tmp_path):
    (item,) = read_items(write(tmp_path / "e.jsonl", [record(7)]))
    assert item.answer == "7"
    assert [turn.value for turn in item.record.turns] == ["see <image> Which?"]
    assert [each.path for each in item.record.media] == [str(tmp_path / "a.png")]


def test_a_meta_json_names_several_files(tmp_path):
    write(tmp_path / "a.jsonl", [record(1)])
    write(tmp_path / "b.jsonl", [record(2)])
    meta = {
        name: {"annotation": f"{name}.jsonl", "root": ".", "repeat_time": 1, "data_augment": False}
        for name in "ab"
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert [item.item_id for item in read_items(tmp_path / "meta.json")] == ["q1", "q2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": None}, "length is None"),
        ({"length": "512"}, "length is '512'"),
        ({"depth": True}, "depth is True"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"id": None}, "id is None"),
        ({"conversations": [{"from": "human", "value": "<image>?"}]}, "must end with the expected answer"),
        ({"image": []}, "for 0 images"),
    ],
)
def test_unusable_records_are_refused_with_their_line(tmp_path, changes, message):
    path = write(tmp_path / "e.jsonl", [record(1), record(2, **changes)])
    with pytest.raises(DataError, match=message) as error:
        read_items(path)
    assert f"{path}:2" in str(error.value)


def test_a_repeated_id_and_an_empty_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"e\.jsonl:1"):
        read_items(write(tmp_path / "e.jsonl", [record(1), record(1)]))
    with pytest.raises(DataError, match="no record"):
        read_items(write(tmp_path / "e.jsonl", []))
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "missing.jsonl")


def test_answers_are_compared_exactly_after_stripping(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", [record(1), record(2, length=1024)]))
    found = ask(items, tmp_path / "p.jsonl", Oracle(memory=512))
    assert [(p.prediction, p.correct) for p in found] == [("1", True), ("none", False)]


def test_short_documents_are_asked_first(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", [record(n, length=512 - n) for n in range(3)]))
    oracle = Oracle()
    ask(items, tmp_path / "p.jsonl", oracle)
    assert [name for name, _ in oracle.asked] == ["q2", "q1", "q0"]


def test_an_answer_is_on_disk_before_the_next_question(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", [record(n) for n in range(3)]))
    path = tmp_path / "p.jsonl"

    class Killed(Oracle):
        def answer(self, item, setting):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().answer(item, setting)

    with pytest.raises(KeyboardInterrupt):
        ask(items, path, Killed())
    assert [values["id"] for _, values in read_jsonl(path)] == ["q0", "q1"]


def test_predictions_of_other_data_are_refused(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", [record(1)]))
    ask(items, tmp_path / "p.jsonl", Oracle())
    others = read_items(write(tmp_path / "f.jsonl", [record(1, length=100)]))
    with pytest.raises(DataError, match="not in this data"):
        read_predictions(tmp_path / "p.jsonl", others)
    (tmp_path / "p.jsonl").write_text('{"id": "q1"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:1: not a prediction"):
        read_predictions(tmp_path / "p.jsonl", items)
    assert read_predictions(tmp_path / "none.jsonl", items) == {}


def test_scores_are_counted_by_length_and_depth():
    def made(length, depth, correct):
        return Prediction(id="x", length=length, depth=depth, answer="1", prediction="1", correct=correct)

    cells = score([made(8, 0.5, True), made(8, 0.5, False), made(8, 0.1, True), made(4, 0.5, False)])
    assert [(c.length, c.depth, c.correct, c.count) for c in cells] == [
        (4, 0.5, 0, 1),
        (8, 0.1, 1, 1),
        (8, 0.5, 1, 2),
    ]
    totals = by_length(cells)
    assert list(totals) == [4, 8]
    assert totals[8].accuracy == pytest.approx(2 / 3)
