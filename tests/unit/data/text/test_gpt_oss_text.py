"""GPT-OSS's template: headers of answers, two end tokens, functions' messages; the text of what a model says."""

import json

import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.encode import TextSettings, encode_conversation
from megatron_v2pe.data.samples.records import parse_line
from megatron_v2pe.data.samples.split import rounds_of
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.text.agreement import foreign_markers
from megatron_v2pe.data.text.answers import AnswerHeader
from megatron_v2pe.data.text.templates import TEMPLATES, Turn, render
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from megatron_v2pe.inference.text_stream import TextStream
from tests.support.hf_folders import FAMILIES_GOLDEN

TOKENIZER = load_tokenizer(FAMILIES_GOLDEN / "ckpt" / "l_gptoss_vit300m")
QWEN3 = load_tokenizer(FAMILIES_GOLDEN / "ckpt" / "h_qwen3_vit300m")
TEMPLATE = TEMPLATES["internvl3_5_gpt_oss"]
HEADER = AnswerHeader(TOKENIZER, TEMPLATE)
ASKED = [Turn(role="human", value="Q"), Turn(role="tool", value="12"), Turn(role="gpt", value="A")]


def supervised(turns, **options):
    settings = TextSettings(
        tokenizer=TOKENIZER, template=TEMPLATE, tokens_per_tile=4, max_tokens=999, **options
    )
    encoded = encode_conversation(turns, num_tiles=[], settings=settings)
    return TOKENIZER.decode(encoded.labels[encoded.labels != IGNORE_INDEX].tolist())


def test_the_last_answer_ends_all_and_what_a_function_said_is_not_learned():
    more = [*ASKED, Turn(role="human", value="R"), Turn(role="gpt", value="B")]
    text = render(TEMPLATE, more).text.removeprefix(TEMPLATE.system)
    assert text == (
        "<|end|><|start|>user<|message|>Q<|end|><|start|>tool<|message|>12<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A<|end|><|start|>user<|message|>R<|end|>"
        "<|start|>assistant<|channel|>final<|message|>B<|return|>"
    )
    said = "<|channel|>final<|message|>"
    assert supervised(more) == f"{said}A<|end|>{said}B<|return|>"
    assert (
        supervised([ASKED[0], Turn(role="gpt", value="A", supervised=False), *more[3:]])
        == f"{said}B<|return|>"
    )
    prompt = render(TEMPLATE, more[:4], add_generation_prompt=True).text
    assert prompt.endswith("A<|end|><|start|>user<|message|>R<|end|><|start|>assistant")
    assert TEMPLATE.stop_token == "<|return|>"


def test_control_tokens_in_a_text_are_text():
    spelled = [Turn(role="human", value="<|return|>"), Turn(role="gpt", value="<|channel|>final")]
    wanted = "<|channel|>final<|message|><|channel|>final<|return|>"
    assert supervised(spelled) == wanted
    settings = dict(tokenizer=TOKENIZER, template=TEMPLATE, tokens_per_tile=4, max_tokens=999)
    tokens = encode_conversation(spelled, num_tiles=[], settings=TextSettings(**settings)).tokens.tolist()
    assert tokens.count(TOKENIZER.token_id("<|return|>")) == 1
    assert tokens.count(TOKENIZER.token_id("<|channel|>")) == 1


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != TEMPLATE.name])
def test_templates_without_functions_refuse_their_messages(name):
    with pytest.raises(DataError, match=f"from a function, but template '{name}' has no role"):
        render(TEMPLATES[name], ASKED)


def test_a_template_of_another_tokenizer_is_found_by_its_markers():
    missing = foreign_markers(TEMPLATE, QWEN3)
    assert missing == ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
    assert foreign_markers(TEMPLATE, TOKENIZER) == []


def test_records_with_functions(tmp_path):
    entry = DatasetEntry(name="set", annotation="a.jsonl", root=str(tmp_path))
    said = [
        ("human", "Q"),
        ("function", "12"),
        ("observation", "13"),
        ("gpt", "A"),
        ("human", "R"),
        ("gpt", "B"),
    ]
    line = json.dumps({"conversations": [{"from": role, "value": text} for role, text in said]}).encode()
    record = parse_line(line, entry=entry, line_number=1)
    assert [turn.role for turn in record.turns] == ["human", "tool", "tool", "gpt", "human", "gpt"]
    assert record.notes == ()
    assert [len(each.turns) for each in rounds_of(record)] == [4, 2]
    assert all(each.num_units == 1 for each in rounds_of(record))


def test_the_text_of_an_answer_is_what_follows_its_header():
    tokens = TOKENIZER.encode("<|channel|>final<|message|>Two dogs", add_bos=False)
    assert TOKENIZER.decode(HEADER.without(tokens), skip_special_tokens=True) == "Two dogs"
    plain = TOKENIZER.encode("Two dogs", add_bos=False)  # of a model that says no header
    assert (HEADER.end(plain), HEADER.without(plain)) == (None, plain)
    analysed = TOKENIZER.encode("<|channel|>analysis<|message|>hm<|end|><|start|>assistant", add_bos=False)
    assert HEADER.without([*analysed, *tokens]) == HEADER.without(tokens)
    other = AnswerHeader(QWEN3, TEMPLATES["internvl2_5"])
    assert (other.ids, other.end(plain), other.without(plain)) == ([], 0, plain)


def test_a_stream_gives_out_nothing_of_the_header():
    tokens = TOKENIZER.encode("<|channel|>final<|message|>Two dogs. No", add_bos=False)
    stream = TextStream(TOKENIZER, ["No"], HEADER)
    pieces = [stream.feed(tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert "".join(pieces) == "Two dogs. "
    assert stream.is_stopped
    assert not any(pieces[: len(HEADER.ids)])
    without = TextStream(TOKENIZER, (), HEADER)
    plain = TOKENIZER.encode("Two dogs", add_bos=False)
    assert [without.feed(plain[:count]) for count in (1, len(plain))] == ["", ""]
    assert without.finish(plain) == "Two dogs"
