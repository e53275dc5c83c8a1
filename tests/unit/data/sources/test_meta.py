"""The meta json: defaults, path lookup, and what is refused."""

import json
import os

import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.sources.meta import read_meta

GOOD = {"annotation": "a.jsonl", "root": "images", "repeat_time": 0.5, "data_augment": True}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")

    def _write(values):
        path = tmp_path / "meta.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return _write


def test_paths_beside_the_meta_file_come_first(write, tmp_path):
    (tmp_path / "images").mkdir()
    (entry,) = read_meta(write({"x": GOOD}))
    assert (entry.annotation, entry.root) == (str(tmp_path / "a.jsonl"), str(tmp_path / "images"))
    assert (entry.name, entry.repeat_time, entry.data_augment) == ("x", 0.5, True)
    assert (entry.max_dynamic_patch, entry.dynamic_image_size) == (None, None)


def test_paths_of_the_current_folder_are_found_too(write, tmp_path, monkeypatch):
    path = write({"x": GOOD})
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = path.rename(other / "meta.json")
    monkeypatch.chdir(tmp_path)
    assert read_meta(path)[0].annotation == "a.jsonl"


def test_keys_of_the_release_are_accepted(write):
    values = {**GOOD, "length": 7, "max_dynamic_patch": 5, "dynamic_image_size": False, "root": None}
    (entry,) = read_meta(write({"x": values}))
    assert (entry.max_dynamic_patch, entry.dynamic_image_size, entry.root) == (5, False, "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "not valid json"),
        ([1], "must hold a json object"),
        ({}, "at least one data set"),
        ({"x": 1}, "x: must be an object"),
        ({"x": {**GOOD, "repeat_tme": 1}}, "unknown key 'repeat_tme'; did you mean 'repeat_time'"),
        ({"x": {**GOOD, "zzz": 1}}, "unknown key 'zzz'; known keys"),
        ({"x": {**GOOD, "repeat_time": "2"}}, "repeat_time is '2', but must be int or float"),
        ({"x": {**GOOD, "repeat_time": True}}, "repeat_time is True"),
        ({"x": {**GOOD, "repeat_time": 0}}, "repeat_time is 0, but must be positive"),
        ({"x": {**GOOD, "repeat_time": float("nan")}}, "repeat_time is nan, but must be positive"),
        (
            {"x": {**GOOD, "repeat_time": float("inf")}},
            "repeat_time is inf, but must be positive and at most",
        ),
        ({"x": {**GOOD, "video_fps": float("nan")}}, "video_fps is nan, but must be positive"),
        (f'{{"x": {json.dumps(GOOD)}, "x": {json.dumps(GOOD)}}}', "the name 'x' is given twice"),
        ('{"x": {"repeat_time": 1, "repeat_time": 2}}', "the name 'repeat_time' is given twice"),
        ("[" * 100_000, "not valid json"),
        ({"x": {**GOOD, "max_dynamic_patch": 0}}, "must lie in 1..1024"),
        ({"x": {**GOOD, "max_dynamic_patch": 10**6}}, "must lie in 1..1024"),
        ({"x": {"root": ""}}, "key 'annotation' is missing"),
        ({"x": {**GOOD, "annotation": "b.jsonl"}}, "neither beside the meta file nor"),
    ],
)
def test_mistakes_are_refused(write, values, message):
    with pytest.raises(DataError, match=message):
        read_meta(write(values))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"data\.meta: .*no such file"):
        read_meta(tmp_path / "meta.json")


def test_a_pipe_is_no_meta_file_and_records_are_no_data_sets(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="a pipe, socket or device"):
        read_meta(tmp_path / "pipe.json")
    (tmp_path / "meta.json").write_text(json.dumps([{"conversations": []}]))
    with pytest.raises(
        DataError, match="holds records, not a list of data sets; name their file as 'annotation'"
    ):
        read_meta(tmp_path / "meta.json")
    (tmp_path / "meta.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="it is a Git LFS pointer"):
        read_meta(tmp_path / "meta.json")


def test_formats_and_system_texts_of_data_sets(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    values = {"annotation": "a.jsonl", "repeat_time": 1, "data_augment": False}
    (tmp_path / "meta.json").write_text(
        json.dumps({"a": {**values, "format": "openai", "system": "Be brief."}})
    )
    (found,) = read_meta(tmp_path / "meta.json")
    assert (found.format, found.system) == ("openai", "Be brief.")
    (tmp_path / "meta.json").write_text(json.dumps({"a": {**values, "format": "gpt"}}))
    with pytest.raises(DataError, match="format is 'gpt', but must be one of auto, internvl"):
        read_meta(tmp_path / "meta.json")
