"""Records of public formats: read alike, said, or refused with the right key; nothing passes silently."""

import json
import re

import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.video import VideoFile
from megatron_v2pe.data.samples.draw import Draw, encode_draw
from megatron_v2pe.data.samples.formats import note_text
from megatron_v2pe.data.samples.measure import LineMeasurer
from megatron_v2pe.data.samples.records import parse_line, write_images
from tests.support.mixture import entry, record, write_image

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
ROLES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a cat"}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
]
URLS = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text":
     "What?"}]},
    {"role": "assistant", "content": "a cat"},
]  # fmt: skip


def parse(values, **changes):
    return parse_line(json.dumps(values).encode(), entry=entry(**changes), line_number=7)


def shown(values, **changes):
    parsed = parse(values, **changes)
    return [(turn.role, turn.value) for turn in parsed.turns], [medium.path for medium in parsed.media]


@pytest.mark.parametrize(
    "values",
    [
        {"image": "a.png", "conversations": ASKED},
        {"images": ["a.png"], "conversations": ASKED},
        {"images": "a.png", "conversations": ASKED},
        {"image": ["a.png"], "messages": ROLES},
        {"images": ["a.png"], "conversations": ROLES},
        {"messages": PARTS},
        {"messages": URLS},
        {"query": "<image>\nWhat?", "response": "a cat", "images": ["a.png"]},
        {"instruction": "<image>\nWhat?", "input": "", "output": "a cat", "images": ["a.png"]},
        {"image": {"<image_00>": "a.png"}, "conversations": [{"from": "user", "value": "<image_00>\nWhat?"},
                                                              {"from": "assistant", "value": "a cat"}]},
        {"images": ["a.png"], "conversations": [{"from": "human", "value": "What?"}, ASKED[1]]},
    ],
)  # fmt: skip
def test_formats_of_the_same_conversation(values):
    assert shown(values) == ([("human", "<image>\nWhat?"), ("gpt", "a cat")], ["a.png"])


def test_what_was_understood_otherwise_is_noted():
    assert parse({"image": "a.png", "conversations": ASKED}).notes == ()
    notes = parse({"images": ["a.png"], "messages": ROLES, "uid": 3, "empty": []}).notes
    assert notes == ("format:role/content", "alias:images=image", "unread:uid", "roles")
    assert parse({"image": "a.png", "conversations": ASKED, "answer": "a cat"}).notes == ()  # said twice
    assert parse({"image": "a.png", "conversations": ASKED, "answer": "a dog"}).notes == ("unread:answer",)
    assert note_text("unread:uid", 12, "a.jsonl:7") == "key 'uid' is not read (12 records, first a.jsonl:7)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imgs": ["a.png"]}, "unknown key 'imgs'; is 'image' meant"),
        ({"image_path": "a.png"}, "unknown key 'image_path'; is 'image' meant"),
        ({"imagse": ["a.png"]}, "unknown key 'imagse'; is 'image' meant|is 'images' meant"),
        ({"vido": "a.mp4"}, "unknown key 'vido'; is 'video' meant"),
        ({"sytem": "x"}, "unknown key 'sytem'; is 'system' meant"),
        ({"audios": ["a.wav"]}, "audio is not read"),
        ({"tools": [{}]}, "tools are not read"),
        ({"rejected_response": "x"}, "preference data"),
        ({"video": "v.mp4", "start": 1, "end": 2}, r'"clip": \[start, end\]'),
        ({"image": "a.png", "images": ["a.png"]}, "both 'image' and 'images'"),
        ({"messages": ROLES}, "both 'conversations' and 'messages'"),
        ({"system": 3}, "system must be a text"),
        ({"video": ["v.mp4", "w.mp4"], "clip": [1, 2]}, "a clip and 2 videos"),
        ({"video": [["1.jpg", "2.jpg"]]}, "give the folder that holds them"),
    ],
)
def test_keys_with_meaning_are_refused_with_the_right_one(values, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl:7: .*({message})"):
        parse({**record("a", "b"), **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dialog": [], "id": 1}, "key 'conversations' is missing; is 'dialog' meant"),
        ({"text": "x"}, "key 'conversations' is missing; found keys 'text'"),
        ({"conversations": [ASKED[0], {"from": "gpt", "text": "x"}]}, r"\[1\] must .*; found keys 'from', 'text'"),
        ({"messages": [{"role": "user", "content": "x", "losss": False}]}, "unknown key 'losss'; a message has"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\] is .*type text, image"),
        ({"messages": [{"role": "function_call", "content": "x"}]}, "tool calls are not used"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "first or last message is from a function"),
        ({"conversations": [ASKED[0], {**ASKED[1], "loss": 0.5}]}, "loss is 0.5, but must be true or false"),
        ({"image": "data:image/png;base64," + "A" * 9999, "conversations": ASKED}, r"data: address \(10,021 char"),
        ({"image": "A" * 9999, "conversations": ASKED}, "9,999 characters and is no path; is it the file itself"),
        ({"image": [{"bytes": "x"}], "conversations": ASKED}, "an image inside the record"),
        (record("say <video>", "x"), r"1 times <video> for 0 videos.*\\<video> is the text itself"),
    ],
)  # fmt: skip
def test_other_mistakes(values, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl:7: .*{message}") as caught:
        parse(values)
    assert len(str(caught.value)) < 500


def test_a_named_format_refuses_others():
    assert shown({"messages": PARTS}, format="openai")[1] == ["a.png"]
    with pytest.raises(
        DataError, match="has messages of 'role' and 'content', which is not the data set's format"
    ):
        parse({"messages": PARTS}, format="internvl")


def test_system_texts():
    first = {"conversations": [{"from": "system", "value": "Be brief."}, *record("a", "b")["conversations"]]}
    assert parse(first).system == "Be brief."
    for key in ("system", "system_prompt"):
        assert parse({**record("a", "b"), key: "Be brief."}).messages[0].value == "Be brief."
    assert parse(record("a", "b"), system="Of the set.").system == "Of the set."
    assert parse({**record("a", "b"), "system": "Own."}, system="Of the set.").system == "Own."
    with pytest.raises(DataError, match="a system text of its own and another"):
        parse({**first, "system": "Another."})


def test_a_masked_turn_is_not_supervised(mixture):
    values = record("1+1?", "3 wrong")
    values["conversations"][1]["loss"] = False
    values["conversations"] += record("Sure?", "2")["conversations"]
    assert [turn.supervised for turn in parse(values).turns] == [True, False, True, True]
    line = json.dumps(values).encode()
    masked = LineMeasurer(entry(), mixture.settings())(line, 1)[0].measurement
    both = LineMeasurer(entry(), mixture.settings())(line.replace(b'"loss": false', b'"loss": true'), 1)
    wanted = len(mixture.settings().text.tokenizer.encode("3 wrong", add_bos=False)) + 1
    assert both[0].measurement.num_supervised - masked.num_supervised == wanted
    values["conversations"][3]["weight"] = 0
    with pytest.raises(DataError, match="no supervised token"):
        LineMeasurer(entry(), mixture.settings())(json.dumps(values).encode(), 1)


def test_llava_video_and_media_of_both_kinds():
    parsed = parse({"video": "v.mp4", "conversations": ASKED})
    assert parsed.notes == ("video_image",)
    assert parsed.media == (VideoFile(path="v.mp4"),)
    mixed = parse(
        {**record("<video> then <image> then <video>", "b"), "image": "a.png", "videos": ["v.mp4", "w.mp4"]}
    )
    assert [type(medium) for medium in mixed.media] == [VideoFile, ImageFile, VideoFile]
    text = write_images(mixed, [[(8, 8)] * 2, [(8, 8)], [(8, 8)]]).turns[0].value
    assert text == (
        "Frame1: <image>\nFrame2: <image>\n then <image> then Frame1: <image>\n"
    )  # fmt: skip


def test_placeholders_that_are_text(mixture):
    values = record(r"the tag \<image> and \<video>", r"say \<image>")
    parsed = parse(values)
    settings = mixture.settings()
    sample = encode_draw(parsed, (), entry=entry(), settings=settings, draw=Draw(epoch=0))
    text = settings.text.tokenizer.decode(sample.tokens.tolist())
    assert "the tag <image> and <video>" in text
    assert "say <image>" in text
    assert sample.media == ()


def test_two_videos_of_a_record_keep_their_frames(mixture):
    for name, count in (("v", 2), ("w", 3)):
        (mixture.folder / "images" / name).mkdir()
        for number in range(count):
            write_image(mixture.folder / "images" / name / f"{number}.png", 20 + number, 20)
    mixture.write([{**record("<video> or <video>?", "b"), "videos": ["w/", "v/"]}, record("c", "d")] * 2)
    (batch, *_) = next(iter(mixture.loader(mixture.config(steps=1, batch=1, min_num_frame=3))))
    assert batch.num_tiles == 10
    assert not batch.damaged


ANSWERED = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}


def from_parts(part):
    text = {"type": "text", "text": "Q"}
    return {"messages": [{"role": "user", "content": [part, text]}, {"role": "assistant", "content": "A"}]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_list": ["a.png"]}, "unknown key 'image_list'; is 'image' meant"),
        ({"frames": ["1.jpg", "2.jpg"]}, "unknown key 'frames'; is 'video' meant"),
        ({"scan": "pages/1.TIFF"}, "unknown key 'scan'; is 'image' meant"),
        ({"recording": ["talk.mkv"]}, "unknown key 'recording'; is 'video' meant"),
        ({"sound": "talk.wav"}, "key 'sound': audio is not read"),
        ({"loss": False}, "key 'loss' is False: a record as a whole is not masked"),
        ({"weight": 0.5}, "key 'weight' is 0.5: weights of records are not read"),
        ({"label": False}, "key 'label' is False: preference data are not read"),
        ({"kto_tag": False}, "key 'kto_tag' is False: preference data are not read"),
        ({"attachments": [{"path": "a.png"}]}, "unknown key 'attachments'; is 'image' meant"),
        ({"content": {"first": {"file": "a.mp4"}}}, "unknown key 'content'; is 'video' meant"),
        ({"image": '["a.png", "b.png"]'}, "a list written as a text"),
        (
            {"image": "iVBORw0KGgo" + "A" * 60},
            "71 characters and is no path; is it the file itself as base64",
        ),
        ({"conversations": "[1]"}, "json written as a text"),
    ],
)
def test_keys_that_carry_media_or_meaning_are_refused(values, said):
    with pytest.raises(DataError, match=re.escape(said)):
        parse({**ANSWERED, **values})


@pytest.mark.parametrize(
    "values", [{"loss": True}, {"weight": 1.0}, {"label": "cat"}, {"source": "web"}, {"license": ["x.txt"]}]
)
def test_keys_that_change_nothing_are_counted(values):
    assert parse({**ANSWERED, **values}).notes == (f"unread:{next(iter(values))}",)


def test_what_is_lost_of_a_conversation_is_counted():
    """As in the release, an opening of the assistant is no part of a sample; it is said, once a data set."""
    turns = [{"from": "gpt", "value": "Welcome"}, *ANSWERED["conversations"]]
    found = parse({"conversations": turns})
    assert found.notes == ("opening",)
    assert found.turns == parse(ANSWERED).turns
    assert note_text("opening", 3, "a.jsonl:1").startswith("a first message from 'gpt' is left out")


@pytest.mark.parametrize("key", [{}, {"image": "a.png"}])
def test_a_picture_that_a_text_names_as_qwen_vl_does_is_refused(key):
    turns = [
        {"from": "human", "value": "Picture 1: <img>b/a.jpg</img>\nWhat?"},
        {"from": "gpt", "value": "A"},
    ]
    with pytest.raises(DataError, match=r"the text names a file in '<img>b/a\.jpg</img>', as Qwen-VL"):
        parse({**key, "conversations": turns})
    turns[0]["value"] = "What is <img></img> in html, and <img>text</img>?"
    assert parse({"conversations": turns}).media == ()


def test_a_placeholder_in_the_system_text_is_blamed_on_it():
    with pytest.raises(DataError, match="the system text has a placeholder of an image"):
        parse({"image": ["a.png"], "system": "see <image>", **ANSWERED})


def test_names_of_files_beside_the_picture_are_counted():
    found = parse({"image": "a.png", "source": "coco/1.jpg", "conversations": ASKED})
    assert found.notes == ("unread:source",)


@pytest.mark.parametrize(
    "spelled", ["<IMAGE>", "< image >", "<|image|>", "<|image_pad|>", "<image1>", "<ImageHere>", "[image]"]
)
def test_placeholders_of_other_programs_are_named(spelled):
    turns = [{"from": "human", "value": f"{spelled} What?"}, {"from": "gpt", "value": "a cat"}]
    for images in ("a.png", ["a.png", "b.png"]):
        with pytest.raises(DataError, match=re.escape(f"the text has {spelled!r}")):
            parse({"image": images, "conversations": turns})


def test_what_looks_like_a_placeholder_beside_the_right_ones_is_text():
    text = "<image> and <video>\nsee [image] <img src='x'>"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a cat"}]
    values = {"image": "a.png", "video": "v.mp4", "conversations": turns}
    assert shown(values)[0][0] == ("human", text)
    html = [{"from": "human", "value": "<img src='x'>"}, {"from": "gpt", "value": "a cat"}]
    assert shown({"image": "a.png", "conversations": html})[0][0] == ("human", "<image>\n<img src='x'>")


def test_keys_of_parts():
    image = {"type": "image", "image": "a.png", "detail": "high", "index": None}
    assert "unread:detail (image part)" in parse(from_parts(image)).notes
    with pytest.raises(DataError, match=r'video_start of a part: .* as "clip"'):
        parse(from_parts({"type": "video", "video": "v.mp4", "video_start": 3}))
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    with pytest.raises(DataError, match=r"names its file as 'image', .*; found 'source'"):
        parse(from_parts({"type": "image", "source": source}))
    responses = parse(from_parts({"type": "input_image", "image_url": "a.png"}))
    assert responses.media == parse(from_parts({"type": "image", "image": "a.png"})).media
    with pytest.raises(DataError, match="its content is None"):
        parse({"messages": [ROLES[0], {"role": "assistant", "content": None}]})


@pytest.mark.parametrize(
    "line",
    [
        b'{"image": "a.png", "image": "b.png", "conversations": []}',
        b'{"conversations": [{"from": "human", "value": "Q", "value": "R"}]}',
    ],
)
def test_a_key_that_is_there_twice(line):
    with pytest.raises(DataError, match=r"a\.jsonl:7: key '(image|value)' is there twice"):
        parse_line(line, entry=entry(), line_number=7)
