"""core.jsonl: line numbers in errors, whole lines on disk."""

import os

import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import append_json, read_jsonl


def test_append_then_read(tmp_path):
    path = tmp_path / "m.jsonl"
    append_json(path, {"step": 1, "loss": 0.1})
    append_json(path, {"step": 2, "text": "caf\u00e9"})
    assert list(read_jsonl(path)) == [(1, {"step": 1, "loss": 0.1}), (2, {"step": 2, "text": "caf\u00e9"})]


def test_empty_lines_keep_the_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert [number for number, _ in read_jsonl(path)] == [1, 4]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": ', "2: not valid json"),
        (b"[1, 2]", "2: must be a json object, found list"),
        (b'{"a": "\xff"}', "2: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"m.jsonl:{words}"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))


def test_not_a_number_is_refused_and_not_written(tmp_path):
    path = tmp_path / "m.jsonl"
    with pytest.raises(ValueError, match="JSON compliant"):
        append_json(path, {"loss": float("nan")})
    assert not path.exists()


def test_a_line_that_finds_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    append_json(path, {"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(OSError, match="No space left") as caught:
        append_json(path, {"step": 2})
    assert caught.value.filename == str(path)
    assert path.read_text() == '{"step": 1}\n'


def test_a_last_line_without_its_end_is_passed_over_where_a_run_may_have_died(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_jsonl(path, skip_cut=True)) == [(1, {"step": 1})]
    with pytest.raises(DataError, match=r"m.jsonl:2: not valid json"):
        list(read_jsonl(path))
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m.jsonl:1: not valid json"):
        list(read_jsonl(path, skip_cut=True))
