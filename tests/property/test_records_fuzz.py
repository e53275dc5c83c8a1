"""Whatever stands in an annotation file or an image file, the answer is a result or a DataError."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.images import check_image
from megatron_v2pe.data.records import Record, parse_line
from tests.support.mixture import entry, write_image

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
TEXTS = st.lists(st.sampled_from(["<image>", "<img>", " ", "what", "\n", "<|im_end|>"]), max_size=6).map(
    "".join
)
MESSAGES = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXTS | JSON})
RECORDS = st.fixed_dictionaries(
    {"conversations": st.lists(MESSAGES, max_size=4) | JSON},
    optional={
        "image": st.text(max_size=12) | st.lists(st.text(max_size=12), max_size=3) | JSON,
        "video": JSON,
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
        assert sum(turn.value.count("<image>") for turn in record.turns) == len(record.images)
        assert record.turns[0].role == "human"
        assert all(path.startswith("images/") and ".." not in path.split("/") for path in record.images)


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
