"""Long texts are encoded in blocks: the ids are those of the whole text, whatever is at the cut. Exact."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.data.text import byte_level
from megatron_v2pe.data.text.byte_level import ByteLevelVocabulary, read_qwen2
from tests.support.tokenizers import FOLDERS

QWEN2 = read_qwen2(FOLDERS["qwen2"])
DESCRIPTION = json.loads(QWEN2._backend.to_str())
BLANKS = [" ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "\u200b"]
WORDS = [
    "the",
    "we'll",
    "'s",
    "7",
    "2026",
    ".",
    "?!",
    "caf\u00e9",
    "e\u0301",
    "\u0301",
    "\u56fe",
    "\u1100",
    "\u1161",
]
TEXTS = st.lists(st.sampled_from(BLANKS + WORDS) | st.characters(exclude_categories=["Cs"]), max_size=40).map(
    "".join
)


def described(**changes):
    backend = tokenizers.Tokenizer.from_str(json.dumps({**DESCRIPTION, **changes}))
    return ByteLevelVocabulary(backend, composes=False, digest=b"")


def llama3():
    words = json.loads(json.dumps(DESCRIPTION["pre_tokenizer"]))
    pattern = words["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    return described(pre_tokenizer=words)


VOCABULARIES = {"qwen2": QWEN2, "llama3": llama3(), "qwen2 fast": described(normalizer={"type": "NFC"})}


@pytest.mark.parametrize("name", VOCABULARIES)
@given(text=TEXTS)
@settings(max_examples=400, deadline=None)
def test_blocks_have_the_ids_of_the_whole(name, text):
    vocabulary = VOCABULARIES[name]
    whole = vocabulary.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_level, "_BLOCK_CHARS", 0)
        assert vocabulary.encode(text) == whole


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ordinary_texts_are_cut_at_their_lines(name, monkeypatch):
    monkeypatch.setattr(byte_level, "_BLOCK_CHARS", 20)
    text = "A line of some words.\n" * 5 + "\u8fd9\u662f\u4e00\u884c\n" * 20
    blocks = list(VOCABULARIES[name]._cut(text))
    assert "".join(blocks) == text
    assert len(blocks) > 5
    assert max(map(len, blocks)) < 45


@pytest.mark.parametrize(
    "changes",
    [
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "use_regex": True,
                "trim_offsets": True,
            }
        },
        {"normalizer": {"type": "Prepend", "prepend": "x"}},
        {"truncation": {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}},
    ],
    ids=["another rule of words", "another normal form", "a limit of length"],
)
def test_what_is_not_known_is_not_cut(changes, monkeypatch):
    monkeypatch.setattr(byte_level, "_BLOCK_CHARS", 5)
    assert list(described(**changes)._cut("one line\ntwo lines\nthree lines")) == [
        "one line\ntwo lines\nthree lines"
    ]
