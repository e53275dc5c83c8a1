"""Questions are looked at before the first is asked; plain ones, as training data hold them, are scored four ways."""

import json

import pytest

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.evaluation.retrieval.plain_questions import METRICS, check_items, write_plain_scores
from megatron_v2pe.evaluation.retrieval.questions import (
    Answer,
    answer_items,
    parse_strides,
    read_items,
    read_predictions,
)


def write(path, answers, **changes):
    lines = [
        {
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nColour?"},
                {"from": "gpt", "value": answer},
            ],
            **changes,
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Reader:
    """A token is a word, <ref> is special, and some pictures are missing."""

    def __init__(self, *missing):
        self.missing = missing

    def expected(self, text):
        words = text.split()
        return " ".join(word for word in words if word != "<ref>"), len(words)

    def check_media(self, item):
        for medium in item.record.media:
            if medium.path.endswith(self.missing):
                raise DataError(f"{medium.path}: no such image")


class Model:
    """Says what it is given, by question."""

    def __init__(self, *texts, cut=()):
        self.texts, self.cut, self.asked = texts, cut, []

    def answer(self, item, setting):
        number = int(item.item_id.rpartition(":")[2]) - 1
        self.asked.append(number)
        return Answer(text=self.texts[number], is_cut=number in self.cut)


def answered(items, path, model, problems=None):
    (setting,) = parse_strides("default", tokens_per_tile=4)
    answer_items(
        items,
        setting=setting,
        answerer=model,
        predictions_path=path,
        on_answer=lambda _: None,
        problems=problems,
    )
    return read_predictions(path, items)


def test_records_of_training_data_are_questions(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", ["Red", "Green"]))
    assert [(item.item_id, item.answer, item.length) for item in items] == [
        ("e:1", "Red", 0),
        ("e:2", "Green", 0),
    ]


def test_plain_questions_need_no_ids_of_their_own(tmp_path):
    """In LLaVA's data an id is a picture's; a table that was written by pandas has empty ones."""
    path = write(tmp_path / "q.jsonl", ["red", "green", "blue"], id="000000033471")
    assert [item.item_id for item in read_items(path)] == [
        "000000033471",
        "000000033471 (q:2)",
        "000000033471 (q:3)",
    ]
    path = write(tmp_path / "none.jsonl", ["red", "green"], id=None, length=None, depth=None)
    assert [item.item_id for item in read_items(path)] == ["none:1", "none:2"]
    path = write(tmp_path / "float.jsonl", ["red"], id=7.0)
    assert [item.item_id for item in read_items(path)] == ["7.0"]


def test_what_is_not_read_of_questions_is_said_once(tmp_path, caplog):
    read_items(write(tmp_path / "q.jsonl", ["red", "green"], source="web"))
    (said,) = [record.message for record in caplog.records if "not read" in record.message]
    assert said == f"key 'source' is not read (2 records, first {tmp_path}/q.jsonl:1)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,question,answer\na.png,b,c\n", "is a CSV table"),
        (b"\x1f\x8b\x08", "is a gzip file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ('{"a": 1}\n'.encode("utf-16"), "UTF-16"),
        (b"[" * 100_000 + b"\n", "one json array"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "q.jsonl:1: not valid json (nested too deep)"),
        (b'{"a": 1' + b"0" * 5000 + b"}\n", "q.jsonl:1: not valid json (Exceeds the limit"),
    ],
    ids=["csv", "gzip", "lfs", "utf16", "array", "deep", "digits"],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_items(tmp_path / "q.jsonl")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_plain_questions_and_retrieval_do_not_mix(tmp_path):
    path = write(tmp_path / "e.jsonl", ["Red"])
    path.write_text(
        path.read_text() + write(tmp_path / "f.jsonl", ["x"], id="r", length=9, depth=0.5).read_text()
    )
    with pytest.raises(DataError, match=r"e\.jsonl:1: has no length and depth"):
        read_items(path)


def test_expected_answers_pass_through_the_decoding_of_answers(tmp_path):
    items, _ = check_items(
        read_items(write(tmp_path / "e.jsonl", ["<ref> red"])), Reader(), max_new_tokens=16
    )
    (prediction,) = answered(items, tmp_path / "p.jsonl", Model("red")).values()
    assert (prediction.answer, prediction.correct) == ("red", True)


def test_an_answer_of_special_tokens_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"e\.jsonl:2: the expected answer '<ref>'"):
        check_items(read_items(write(tmp_path / "e.jsonl", ["a", "<ref>"])), Reader(), max_new_tokens=16)


def test_longer_answers_than_may_be_given_are_refused_before_the_first_question(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", ["a b", "a b c d e", "a b c d"]))
    with pytest.raises(
        ConfigError, match=r"is 3, but 2 of 3 .* first with 5 tokens at .*e.jsonl:2; give --max-new-tokens 5"
    ):
        check_items(items, Reader(), max_new_tokens=3)
    check_items(items, Reader(), max_new_tokens=5)


def test_a_missing_picture_is_named_before_and_is_a_row_that_is_tried_again(tmp_path, caplog):
    path = write(tmp_path / "e.jsonl", ["red", "green"])
    items, problems = check_items(read_items(path), Reader("1.png"), max_new_tokens=4)
    assert "e.jsonl:2" in problems["e:2"]
    assert "1.png: no such image" in caplog.text
    model = Model("red", "green")
    found = answered(items, tmp_path / "p.jsonl", model, problems)
    assert model.asked == [0]
    assert (found["e:2"].error, found["e:2"].correct) == (problems["e:2"], False)
    assert answered(items, tmp_path / "p.jsonl", model)["e:2"].correct  # the last row counts


def test_pictures_of_a_jsonl_file_are_in_the_root_that_is_named(tmp_path):
    (tmp_path / "photos").mkdir()
    path = write(tmp_path / "e.jsonl", ["a"])
    assert read_items(path)[0].entry.root == str(tmp_path)
    assert read_items(path, root=str(tmp_path / "photos"))[0].entry.root == str(tmp_path / "photos")
    with pytest.raises(ConfigError, match="--root is 'none', which is no folder"):
        read_items(path, root="none")
    with pytest.raises(ConfigError, match="a meta json, which has a root for each data set"):
        read_items(tmp_path / "meta.json", root=str(tmp_path))


def test_no_model_is_loaded_where_no_question_can_be_asked(tmp_path):
    path = write(tmp_path / "e.jsonl", ["a", "b"])
    with pytest.raises(DataError, match=r"none of the 2 questions can be asked; the first: .*--root"):
        check_items(read_items(path), Reader("0.png", "1.png"), max_new_tokens=4)


def test_cut_answers_are_marked_unless_they_are_right(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", ["red", "green", "blue"]))
    found = answered(items, tmp_path / "p.jsonl", Model("red", "a gre", "no", cut=(0, 1)))
    assert [each.cut for each in found.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("said", "wanted", "scores"),
    [
        ("Red", "red", (1, 1, 1, 1)),
        ("Red.", "red", (0, 1, 0.75, 1)),
        ("it is red", "red", (0, 0, 0, 1)),
        ("104", "100", (0, 1, pytest.approx(2 / 3), 0)),
        ("blue", "red", (0, 0, 0, 0)),
    ],
)
def test_four_metrics(said, wanted, scores):
    assert tuple(metric(said, wanted) for metric in METRICS.values()) == scores


def test_the_table_counts_errors_as_wrong(tmp_path):
    items = read_items(write(tmp_path / "e.jsonl", ["red", "green", "blue", "grey"]))
    model = Model("red", "Green", "", "a grey", cut=(3,))
    found = answered(items, tmp_path / "p.jsonl", model, {"e:3": "no such image"})
    text = write_plain_scores({"default": list(found.values())}, folder=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())["default"]
    assert (scores["questions"], scores["exact"], scores["contains"]) == (4, 0.5, 0.75)
    assert (scores["cut"], scores["errors"]) == (1, 1)
    assert "1 of 4 questions ended with an error" in text
    assert "1 of 4 answers were cut" in text
    assert (tmp_path / "table.txt").read_text() == text + "\n"


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "score"),
    [
        ("relaxed", "red", "Red.", 1),
        ("relaxed", "\u201cGreen\u201d", "green", 1),
        ("relaxed", "1,040", "1000", 1),
        ("relaxed", "blue", "red", 0),
        ("contains", "It is red.", "Red.", 1),
        ("contains", "I do not know", "no", 0),
        ("contains", "No, it is not", "no", 1),
        ("contains", "\u662f\u7ea2\u8272\u7684", "\u7ea2\u8272", 1),
        ("contains", "12 of 120", "20", 0),
        ("contains", "what?", "?", 1),
        ("exact", "red", "Red.", 0),
    ],
)
def test_marks_and_parts_of_words(metric, said, wanted, score):
    assert METRICS[metric](said, wanted) == score
