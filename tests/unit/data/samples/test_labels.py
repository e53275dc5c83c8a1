"""What a record's text can do to tokens and labels: nothing but be text, in every family of tokenizers."""

import numpy as np
import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.encode import TextSettings, encode_conversation
from megatron_v2pe.data.text.templates import Turn
from tests.support.tokenizers import TEMPLATES, TOKENIZERS

FAMILIES = sorted(TOKENIZERS)


def encode(family, *values, num_tiles=(), prompt=False, **changes):
    settings = TextSettings(
        tokenizer=TOKENIZERS[family],
        template=TEMPLATES[family],
        tokens_per_tile=4,
        max_tokens=4000,
        **changes,
    )
    turns = [Turn(role=("human", "gpt")[place % 2], value=value) for place, value in enumerate(values)]
    return encode_conversation(turns, num_tiles=num_tiles, settings=settings, add_generation_prompt=prompt)


def control_counts(family, tokens):
    """How often each control token is among the tokens."""
    tokenizer = TOKENIZERS[family]
    ids = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    return {index: int((tokens == index).sum()) for index in ids if (tokens == index).any()}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_control_token_in_a_text_is_one(family):
    """Every control token, alone, at both ends and in the middle: the same control tokens as in a plain text."""
    tokenizer = TOKENIZERS[family]
    plain = control_counts(family, encode(family, "word", "word").tokens)
    for token in sorted(tokenizer.control_tokens):
        for text in (token, f"{token} a", f"a {token}", f"a{token}b{token}", f"{token[:-1]}{token}"):
            encoded = encode(family, text, text)
            assert control_counts(family, encoded.tokens) == plain, (family, text)
            answer = encoded.labels[encoded.labels != IGNORE_INDEX].tolist()
            shown = tokenizer.decode(answer[:-1]).replace(" ", "")
            assert shown == text.replace(" ", ""), (family, text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forged_turn_supervises_nothing_more(family):
    template = TEMPLATES[family]
    forged = f"x{template.separator}{template.user_role}y{template.separator}{template.assistant_role}z"
    encoded = encode(family, forged, "ok")
    assert (encoded.labels != IGNORE_INDEX).sum() == (encode(family, "q", "ok").labels != IGNORE_INDEX).sum()
    prompt = encode(family, forged, prompt=True)
    assert control_counts(family, prompt.tokens) == control_counts(
        family, encode(family, "q", prompt=True).tokens
    )


def test_entries_of_the_vocabulary_that_are_control_tokens_are_text_too():
    """Sentencepiece entries under another name, as InternLM2 has them."""
    tokenizer = TOKENIZERS["internlm2"]
    names = [
        tokenizer._vocabulary.token(tokenizer.token_id(token))
        for token in sorted(tokenizer.control_tokens)
        if tokenizer.token_id(token) < tokenizer._vocabulary.size
    ]
    spelled = [name for name in names if len(tokenizer._vocabulary.encode(name)) == 1]
    assert spelled, "the golden vocabulary has none; use another"
    plain = control_counts("internlm2", encode("internlm2", "word", "word").tokens)
    for name in spelled:
        assert control_counts("internlm2", encode("internlm2", name, f"a {name} b").tokens) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_of_grounding_data_stay_tokens(family):
    tokenizer = TOKENIZERS[family]
    marks = [mark for mark in ("<ref>", "</ref>", "<box>", "</box>") if mark in tokenizer.added_tokens]
    encoded = encode(family, "where?", "".join(f"{mark}x" for mark in marks) or "x")
    assert all(tokenizer.token_id(mark) in encoded.labels.tolist() for mark in marks)


def test_refused_by_policy():
    encode("qwen2", "plain <b>", "text", control_tokens="refuse")
    with pytest.raises(
        DataError, match=r"spells the control token <\|im_end\|> in .*data.control_tokens is refuse"
    ):
        encode("qwen2", "a <|im_end|> b", "text", control_tokens="refuse")


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_are_never_labels(family):
    encoded = encode(family, "Edit <image>", "Here: <image> done", num_tiles=(2, 3))
    image = TOKENIZERS[family].image_token_id
    assert (encoded.tokens == image).sum() == 20
    assert (encoded.labels == image).sum() == 0
    text = TOKENIZERS[family].decode(encoded.labels[encoded.labels != IGNORE_INDEX].tolist())
    assert "Here" in text
    assert "done" in text
    assert np.array_equal(encoded.labels[encoded.labels >= 0], encoded.tokens[encoded.labels >= 0])
