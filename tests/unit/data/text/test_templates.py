"""Rendering and label masking, checked by text: what is supervised is read back through the tokenizer.

Where no family is named it is InternLM2's; what differs between the families comes last.
"""

import numpy as np
import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.samples.encode import TextSettings, encode_conversation
from megatron_v2pe.data.text.templates import Turn, get_template, render
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.mixture import HF_FOLDER
from tests.support.tokenizers import TEMPLATES, TOKENIZERS

TEMPLATE = get_template("internlm2-chat")
TOKENIZER = load_tokenizer(HF_FOLDER)


def turns(*values):
    return [Turn(role=("human", "gpt")[place % 2], value=value) for place, value in enumerate(values)]


def encode(values, *, num_tiles=(), rule="exact", max_tokens=1000, tokenizer=TOKENIZER, template=TEMPLATE):
    settings = TextSettings(
        tokenizer=tokenizer, template=template, tokens_per_tile=4, max_tokens=max_tokens, label_rule=rule
    )
    return encode_conversation(turns(*values), num_tiles=num_tiles, settings=settings)


def supervised_text(encoded):
    return TOKENIZER.decode(encoded.labels[encoded.labels != IGNORE_INDEX].tolist())


def test_rendered_text_has_no_newline_after_the_separator():
    text = render(TEMPLATE, turns("Q1", "A1", "Q2"), add_generation_prompt=True).text
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith(
        "<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
        "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
    )


def test_an_empty_answer_renders_its_role_only():
    rendered = render(TEMPLATE, turns("Q", ""))
    assert rendered.text.endswith("<|im_end|><|im_start|>assistant\n")
    assert rendered.answers == ((len(rendered.text), len(rendered.text)),)


def test_every_answer_is_supervised_with_its_separator_and_nothing_else():
    encoded = encode(["  What? ", " two dogs \n", "Sure?", "yes"])
    assert supervised_text(encoded) == " two dogs<|im_end|> yes<|im_end|>"


def test_a_real_end_of_sequence_token_in_the_text_keeps_the_supervision():
    values = ["what is </s>?", "a token"]
    assert supervised_text(encode(values)) == " a token<|im_end|>"
    dropped = encode(values, rule="release")
    assert dropped.lengths_disagree
    assert (dropped.labels == IGNORE_INDEX).all()


def test_visual_tokens_stand_between_the_tags_and_are_not_supervised():
    encoded = encode(["see <image> and <image>", "ok"], num_tiles=[2, 1])
    for start, count in zip(encoded.image_starts.tolist(), (8, 4), strict=True):
        run = encoded.tokens[start - 1 : start + count + 1].tolist()
        tags = [
            TOKENIZER.token_id("<img>"),
            *[TOKENIZER.image_token_id] * count,
            TOKENIZER.token_id("</img>"),
        ]
        assert run == tags
    assert supervised_text(encoded) == " ok<|im_end|>"


def test_both_label_rules_agree_on_an_ordinary_sample():
    values = ["<image> one", "first", "two <image>", "second"]
    exact, release = (encode(values, num_tiles=[1, 3], rule=rule) for rule in ("exact", "release"))
    assert np.array_equal(exact.labels, release.labels)


def test_a_cut_drops_what_is_behind_it():
    whole, cut = encode(["question", "a long answer"]), encode(["question", "a long answer"], max_tokens=108)
    assert len(cut.tokens) == 108
    assert np.array_equal(cut.labels, whole.labels[:108])
    assert cut.num_uncut_tokens == len(whole.tokens)


def test_fewer_placeholders_than_images_is_refused():
    with pytest.raises(ValueError, match="1 times <image> for 2 images"):
        encode(["<image>", "ok"], num_tiles=[1, 1])


def test_unknown_template_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"data\.template is 'alpaca'.*internlm2-chat"):
        get_template("alpaca")


def encode_family(family, values, **options):
    return encode(values, tokenizer=TOKENIZERS[family], template=TEMPLATES[family], **options)


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("Hermes-2", "<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"),
        ("phi3-chat", "<|end|><|user|>\nQ<|end|><|assistant|>\nA<|end|>"),
        ("internvl2_5", "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"),
    ],
)
def test_rendered_texts_of_the_other_templates(name, between):
    template = get_template(name)
    rendered = render(template, turns("Q", "A"))
    assert rendered.text == template.system + between
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["A" + template.stop_token]
    prompt = render(template, turns("Q"), add_generation_prompt=True).text
    assert rendered.text.startswith(prompt)
    assert prompt.endswith(template.assistant_role)


def test_only_internlm2_chat_strips_messages():
    names = ["internlm2-chat", "Hermes-2", "phi3-chat", "internvl2_5"]
    assert [get_template(name).strip_values for name in names] == [True, False, False, False]
    blanks = ["q", "  two dogs \n"]
    assert supervised_text(encode(blanks)) == " two dogs<|im_end|>"
    kept = encode_family("qwen2", blanks)
    supervised = kept.labels[kept.labels != IGNORE_INDEX].tolist()
    assert TOKENIZERS["qwen2"].decode(supervised) == "  two dogs \n<|im_end|>"


def test_the_newline_behind_a_stop_token_is_not_supervised():
    template, tokenizer = get_template("internvl2_5"), TOKENIZERS["qwen2"]
    encoded = encode(["one", "two dogs", "more", ""], tokenizer=tokenizer, template=template)
    # An empty answer is rendered too, and its stop token learned.
    supervised = tokenizer.decode(encoded.labels[encoded.labels != IGNORE_INDEX].tolist())
    assert supervised == "two dogs<|im_end|><|im_end|>"


@pytest.mark.parametrize("family", ["qwen2", "yi", "phi3"])
def test_both_label_rules_agree_on_an_ordinary_sample_of_each_family(family):
    values = ["<image> one", "first", "two <image>", "second"]
    exact, release = (
        encode_family(family, values, num_tiles=[1, 3], rule=rule) for rule in ("exact", "release")
    )
    assert (exact.labels != IGNORE_INDEX).sum() > 2
    assert np.array_equal(exact.labels, release.labels)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen2", ["one", "first", "two", ""]),  # an answer without its stop token
        ("yi", ["one", "what is <unk>?"]),  # the padding token in the text
        ("phi3", ["what is <|endoftext|>?", "first"]),
    ],
)
def test_what_the_release_drops_is_kept(family, values):
    exact, release = (encode_family(family, values, rule=rule) for rule in ("exact", "release"))
    assert release.lengths_disagree
    assert (release.labels == IGNORE_INDEX).all()
    stop = TOKENIZERS[family].token_id(TEMPLATES[family].stop_token)
    assert (exact.labels == stop).sum() == sum(1 for value in values[1::2] if value)


def test_a_system_message_takes_the_place_of_the_templates():
    turns = [Turn(role="system", value="Be brief."), Turn(role="human", value="Hi")]
    assert render(get_template("internvl2_5"), turns, add_generation_prompt=True).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
