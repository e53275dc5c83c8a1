"""A text from `pretrain`: no template, no system text; all of it is learned but images and their tags."""

import dataclasses

import numpy as np
import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.encode import conversation_length, encode_conversation
from megatron_v2pe.data.samples.records import parse_record
from megatron_v2pe.data.samples.split import part_of, rounds_of
from megatron_v2pe.data.text.templates import TEMPLATES, Turn
from tests.support.mixture import entry

TEXT = " A page. <image> three boats <image>"


def parsed(*messages, images=0, dataset=None, **values):
    turns = [{"from": role, "value": text} for role, text in messages]
    values |= {"conversations": turns, "image": [f"{number}.png" for number in range(images)]}
    return parse_record(values, entry=dataset or entry(), sample_id="set:7", where="a.jsonl:7")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("rule", ["exact", "release"])
def test_everything_but_images_is_learned(mixture, template, rule):
    settings = dataclasses.replace(mixture.settings().text, template=TEMPLATES[template], label_rule=rule)
    turns = [Turn(role="pretrain", value=TEXT)]
    encoded = encode_conversation(turns, num_tiles=[2, 1], settings=settings)
    tokenizer = settings.tokenizer
    tags = [tokenizer.token_id(tag) for tag in ("<img>", "</img>", "<IMG_CONTEXT>")]
    is_image = np.isin(encoded.tokens, tags)
    assert is_image.sum() == 3 * settings.tokens_per_tile + 4
    assert np.array_equal(encoded.labels == IGNORE_INDEX, is_image)
    assert np.array_equal(encoded.labels[~is_image], encoded.tokens[~is_image])
    text = tokenizer.encode(TEXT.replace("<image>", "<img></img>"))
    assert encoded.tokens[encoded.tokens != tags[2]].tolist() == text  # blanks at its ends are kept
    assert conversation_length(turns, num_tiles=[2, 1], settings=settings) == (
        len(encoded.tokens),
        (~is_image).sum(),
    )


def test_a_record_of_one_message():
    record = parsed(("pretrain", TEXT), images=2)
    assert [turn.role for turn in record.messages] == ["pretrain"]
    with_system = dataclasses.replace(entry(), system="Answer in French.")
    assert parsed(("pretrain", "text"), dataset=with_system).system == ""  # it is for turns
    assert parsed(("pretrain", "text"), images=0).media == ()
    (turn,) = parse_record(
        {"image": "a.png", "conversations": [{"from": "pretrain", "value": "text"}]},
        entry=entry(), sample_id="set:7", where="a.jsonl:7",
    ).turns  # fmt: skip
    assert turn.value == "<image>\ntext"


@pytest.mark.parametrize(
    ("messages", "values", "words"),
    [
        ([("pretrain", "a"), ("gpt", "b")], {}, "is a text of its own, but this record has 2"),
        ([("human", "a"), ("pretrain", "b")], {}, "is a text of its own, but this record has 2"),
        ([("pretrain", "a")], {"system": "Be brief."}, "has no system text"),
        ([("system", "Be brief."), ("pretrain", "a")], {}, "has no system text"),
    ],
)
def test_it_is_no_turn_of_a_conversation(messages, values, words):
    with pytest.raises(DataError, match=words):
        parsed(*messages, **values)


def test_parts_of_it_repeat_nothing():
    record = parsed(("pretrain", "a <image> b <image> c <image> d"), images=3)
    assert [each.num_units for each in rounds_of(record)] == [3]
    cuts = [part_of(record, units) for units in ((0, 2), (2, 3))]
    assert [part.turns[0].value for part, _ in cuts] == ["a <image> b <image> c ", "<image> d"]
    assert [images for _, images in cuts] == [[0, 1], [2]]
