"""Annotation records: the three kinds, the release's habits, and every mistake with file and line."""

import hashlib
import json

import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.video import VideoFile
from megatron_v2pe.data.samples.records import parse_line, write_images
from tests.support.mixture import entry, record

SET = entry(annotation="a.jsonl", root="images")


def files(*paths):
    return tuple(ImageFile(path=path) for path in paths)


def parse(values, dataset=SET):
    line = values if isinstance(values, bytes) else json.dumps(values).encode()
    return parse_line(line, entry=dataset, line_number=7)


def test_text_single_and_multi_image_records():
    assert parse(record("hello", "hi")).media == ()
    assert parse(record("<image> hello", "hi", "x.png")).media == files("images/x.png")
    many = parse(record("<image> and <image>", "hi", ["x.png", "sub/y.png"]))
    assert many.media == files("images/x.png", "images/sub/y.png")
    assert (many.sample_id, many.where) == ("set:7", "a.jsonl:7")


def test_the_mark_that_some_editors_put_at_the_start_of_a_file_is_not_part_of_the_record():
    assert parse(b"\xef\xbb\xbf" + json.dumps(record("hello", "hi")).encode()).turns[0].value == "hello"


def test_a_single_image_without_placeholder_gets_one_in_front():
    parsed = parse(record("hello", "hi", "x.png"))
    assert parsed.turns[0].value == "<image>\nhello"


def test_a_single_image_keeps_its_placeholder_in_a_later_message():
    values = record("hello", "hi", "x.png")
    values["conversations"] += [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "ok"}]
    assert [turn.value for turn in parse(values).turns] == ["hello", "hi", "<image>?", "ok"]


def test_an_opening_of_the_assistant_is_dropped():
    values = record("hello", "hi")
    values["conversations"].insert(0, {"from": "gpt", "value": "welcome"})
    assert [turn.role for turn in parse(values).turns] == ["human", "gpt"]


def test_roots_of_lists_and_of_web_addresses():
    dataset = entry(root="images", root2="other", http_root="web/")
    assert parse(record("<image>", "hi", ["x.png"]), dataset).media == files("other/x.png")
    assert parse(record("<image>", "hi", "x.png"), dataset).media == files("images/x.png")
    url = "http://example.org/x.png"
    digest = hashlib.sha256(url.encode()).hexdigest()
    assert parse(record("<image>", "hi", url), dataset).media == files(f"web/{digest}")


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("what happens?", "{}what happens?"),
        ("<video>\nwhat happens?", "{}what happens?"),
        ("look: <video> what happens?", "look: {} what happens?"),
    ],
)
def test_a_video_becomes_a_line_for_each_frame(question, wanted):
    """The lines of the release's evaluation, not those of its training code."""
    parsed = parse({**record(question, "hi"), "video": "sub/v.mp4", "clip": [1, 2.5]})
    assert parsed.media == (VideoFile(path="images/sub/v.mp4", clip=(1.0, 2.5)),)
    lines = "Frame1: <image>\nFrame2: <image>\n"
    assert write_images(parsed, [[(64, 48)] * 2]).turns[0].value == wanted.format(lines)
    assert parse({**record(question, "hi"), "video": "frames/"}).media == (VideoFile(path="images/frames/"),)


def turn(role, value):
    return {"from": role, "value": value}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (b'{"conversations": [', "not valid json"),
        (b"\xff\xfe", "not utf-8"),
        (b"[1, 2]", "must be a json object, found list"),
        (b"[" * 100_000, "not valid json"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not valid json"),
        ({}, "key 'conversations' is missing; found no key at all"),
        ({"conversations": []}, "at least one message"),
        ({"conversations": ["hi"]}, r"conversations\[0\] must be an object"),
        ({"conversations": [turn("human", 3)]}, r"conversations\[0\] must be an object"),
        ({"conversations": [turn("narrator", "x")]}, "is 'narrator', but must be 'human' or 'gpt'"),
        ({"conversations": [turn("tool", "x")]}, "first or last message is from a function"),
        (
            {"conversations": [turn("human", "x"), turn("function", "y")]},
            "first or last message is from a func",
        ),
        (
            {"conversations": [turn("human", "x"), turn("function", "y"), turn("human", "z")]},
            "'human' follows 'tool'",
        ),
        ({"conversations": [turn("human", "x"), turn("system", "y")]}, "'system' is not the first"),
        ({"conversations": [turn("system", "x")]}, "no human message"),
        (
            {"conversations": [turn("system", "<image>"), turn("human", "y")]},
            "the system text has a placeholder",
        ),
        ({"conversations": [turn("gpt", "x")]}, "no human message"),
        ({"conversations": [turn("human", "x"), turn("human", "y")]}, "must alternate human, gpt"),
        (record("<image>", "a", ["x.png", "y.png"]), "1 times <image> for 2 images"),
        (record("<image> <image>", "a", "x.png"), "2 times <image> for 1 images"),
        (record("<image>", "a"), "1 times <image> for 0 images"),
        (record("no place", "a", ["x.png"]), "0 times <image> for 1 images"),
        (record("<image>", "a", ["../x.png"]), "outside the data set's root"),
        (record("<image>", "a", [3]), "image must be a path or a list of paths"),
        (record("<image>", "a", {"path": "x"}), "image must be a path or a list of paths"),
        (
            record("say \ud83d!", "a"),
            r"conversations\[0\]: its text has '\\ud83d' at character 5, half of a surrogate pair",
        ),
        (record("<image>", "a", "x\ud83d.png"), "image has .* at character 2, half of a surrogate pair"),
        (
            {**record("a", "b"), "video": "\udc00.mp4"},
            "video has .* at character 1, half of a surrogate pair",
        ),
        ({**record("a", "b"), "video": [3]}, "video must be a path or a list of paths"),
        ({**record("<video>", "b"), "video": ["v.mp4", "w.mp4"]}, "1 times <video> for 2 videos"),
        ({**record("<video> <video>", "b"), "video": "v.mp4"}, "2 times <video>"),
        ({**record("<image> <video>", "b"), "video": "v.mp4"}, "1 times <image> for 0 images"),
        (record("<video>", "b"), "1 times <video> for 0 videos"),
        ({**record("a", "b"), "video": "../v.mp4"}, "video '../v.mp4' lies outside"),
        ({**record("a", "b"), "video": "v.mp4", "clip": [3]}, r"clip must be \[start, end\]"),
        ({**record("a", "b"), "video": "v.mp4", "clip": [3, 3]}, r"clip must be \[start, end\]"),
        ({**record("a", "b"), "video": "v.mp4", "clip": [-1, 3]}, r"clip must be \[start, end\]"),
    ],
)
def test_mistakes_name_file_and_line(values, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl:7: .*{message}"):
        parse(values)


@pytest.mark.parametrize("name", ["../" + "a" * 3000, "http://x/" + "a" * 3000, "a\0" + "a" * 3000])
def test_names_of_any_length_make_no_long_message(name):
    with pytest.raises(DataError) as caught:
        parse({**record("a", "b"), "video": name})
    assert len(str(caught.value)) < 800
