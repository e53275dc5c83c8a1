"""Whatever is in an annotation file, an image or a video, the answer is a result or a DataError."""

import json
import posixpath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.image import ImageFile, check_image
from megatron_v2pe.data.media.video_stream import probe_video, read_frames
from megatron_v2pe.data.samples.records import Record, parse_line, write_images
from megatron_v2pe.data.sources.storage import resolve_path
from tests.support.mixture import entry, write_image
from tests.support.videos import write_video

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
TEXTS = st.lists(
    st.sampled_from(["<image>", "<video>", "<img>", " ", "what", "\n", "<|im_end|>", "\ud83d"]), max_size=6
).map("".join)
MESSAGES = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXTS | JSON})
RECORDS = st.fixed_dictionaries(
    {"conversations": st.lists(MESSAGES, max_size=4) | JSON},
    optional={
        "image": st.text(max_size=12) | st.lists(st.text(max_size=12), max_size=3) | JSON,
        "video": st.text(max_size=12)
        | st.sampled_from(["v.mp4", "frames/", "../v.mp4", "s3://b/v.mp4"])
        | JSON,
        "clip": st.lists(st.integers(-1, 5) | st.floats(), max_size=3) | JSON,
    },
)


def parse(line):
    """The record, or the message of the DataError."""
    try:
        return parse_line(line, entry=entry(root="images"), line_number=3)
    except DataError as error:
        return str(error)


@given(line=st.binary(max_size=60))
@settings(max_examples=200)
def test_any_bytes(line):
    assert parse(line).startswith("a.jsonl:3: ")


@given(values=RECORDS)
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_any_record(values):
    record = parse(json.dumps(values).encode())
    if isinstance(record, str):
        assert record.startswith("a.jsonl:3: ")
    else:
        assert isinstance(record, Record)
        pictures = [medium for medium in record.media if isinstance(medium, ImageFile)]
        assert sum(turn.value.count("<image>") for turn in record.turns) == len(pictures)
        assert record.turns[0].role == "human"
        assert not any("\ud83d" in turn.value for turn in record.turns)  # no tokenizer accepts it
        paths = [medium.path for medium in record.media]
        assert all(path.startswith("images") and ".." not in path.split("/") for path in paths)
        videos = [medium for medium in record.media if not isinstance(medium, ImageFile)]
        shown = write_images(record, [[(64, 48)] * (medium.num_images or 3) for medium in record.media])
        assert sum(turn.value.count("<image>") for turn in shown.turns) == len(pictures) + 3 * len(videos)
        assert all(not video.clip or 0 <= video.clip[0] < video.clip[1] for video in videos)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_an_image(tmp_path, data):
    path = tmp_path / "a.png"
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "webp", "bmp", "tif"]))
    write_image(tmp_path / f"source.{suffix}", 24, 16)
    content = bytearray((tmp_path / f"source.{suffix}").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        size, message = check_image(str(path), max_pixels=10**6), str(path)
    except DataError as error:
        size, message = (1, 1), str(error)
    assert str(path) in message
    assert 0 < size[0] * size[1] <= 10**6


@given(
    name=st.text(max_size=20)
    | st.lists(st.sampled_from(["..", ".", "a", "/", "//", "s3://", "b"])).map("".join)
)
@settings(max_examples=300)
def test_no_name_leaves_its_root(name):
    """Whatever an annotation names is below the root, on disk and at an address, or refused."""
    for root in ("/data/images", "s3://bucket/images", "s3://bucket/images/"):
        try:
            path = resolve_path(root, name, where="a.jsonl:3")
        except DataError as error:
            message = str(error)
            assert message.startswith("a.jsonl:3: ")
        else:
            normal = posixpath.normpath(path.partition("://")[2] if "://" in path else path)
            assert f"{normal}/".startswith(("/data/images/", "bucket/images/"))


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_video(tmp_path, data):
    """A video opens and gives its frames, or it is a DataError that names it."""
    pytest.importorskip("av")
    name = data.draw(st.sampled_from(["a.mp4", "a.avi", "a.gif"]))
    sound = tmp_path / f"sound_{name}"
    if not sound.exists():
        write_video(sound, 9, codec="gif" if name == "a.gif" else "mpeg4", gop=0 if name == "a.gif" else 8)
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    limits = {"clip": None, "max_seconds": 60.0, "max_pixels": 10**6}
    try:
        size, count = probe_video(str(path), wanted=4, **limits)
        places = (0.0,) * count
        frames = list(read_frames(str(path), range(count), places=places, size=size, **limits))
        assert 0 < len(frames) == count <= 4
        assert all(frame.mode == "RGB" for frame in frames)
        message = str(path)
    except DataError as error:
        message = str(error)
    assert str(path) in message
