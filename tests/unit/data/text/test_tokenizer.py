"""The tokenizer beyond the golden cases: marks in the text, pickling, and broken folders."""

import json
import pickle
import shutil

import pytest

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.mixture import HF_FOLDER


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(HF_FOLDER)


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copyfile(HF_FOLDER / name, tmp_path / name)
    return tmp_path


def test_known_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.image_token_id == tokenizer.token_id("<IMG_CONTEXT>") == 593
    assert tokenizer.vocab_size == 600


def test_marks_split_the_ids_where_the_text_is_split(tokenizer):
    text = "<|im_start|>assistant\nThe river<|im_end|>"
    answer = text.index("The")
    ids, places = tokenizer.encode_marked(text, [0, answer, len(text)])
    assert tokenizer.decode(ids[places[1] : places[2]]) == " The river<|im_end|>"
    assert ids[: places[1]] == tokenizer.encode(text[:answer])
    assert (places[0], places[2]) == (1, len(ids))


def test_a_token_that_straddles_a_mark_counts_as_after_it(tokenizer):
    assert tokenizer.tokenize("The river") == ["The", "\u2581", "ri", "ver"]
    ids, places = tokenizer.encode_marked("The river", [1, 3, 6, 7])  # inside The, after it, after ri, in ver
    assert ids == tokenizer.encode("The river")
    assert places == [1, 2, 4, 4]


def test_pickled_copy_encodes_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "<img></img> a stone bridge"
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.fingerprint == tokenizer.fingerprint


def test_ids_of_a_padded_vocab_add_no_text_and_ids_below_zero_are_refused(tokenizer):
    known = tokenizer.encode("a stone bridge", add_bos=False)
    assert tokenizer.decode([600, *known, 10_000]) == tokenizer.decode(known)
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 600"):
        tokenizer.decode([*known, -1])


def test_unknown_token_is_an_error(tokenizer):
    with pytest.raises(CheckpointError, match="no token '<video>'"):
        tokenizer.token_id("<video>")


def test_fingerprint_follows_the_added_tokens(tokenizer, folder):
    values = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({**values, "<extra>": 600}))
    changed = load_tokenizer(folder)
    assert changed.fingerprint != tokenizer.fingerprint
    assert changed.encode("a<extra>b")[2] == 600


def edit_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_add_bos_token_false_is_kept(folder):
    edit_config(folder, add_bos_token=False)
    assert load_tokenizer(folder).encode("a") == load_tokenizer(HF_FOLDER).encode("a")[1:]


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json: no such file"),
        (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"nonsense"), "not a sentencepiece model"),
        (lambda f: (f / "added_tokens.json").write_text("{"), "added_tokens.json: not valid json"),
        (
            lambda f: edit_config(f, tokenizer_class="BertTokenizer"),
            "supported: InternLM2Tokenizer, InternLM3Tokenizer, Llama",
        ),
        (
            lambda f: edit_config(f, added_tokens_decoder={"7": {"content": "<x>", "lstrip": True}}),
            "'<x>' has lstrip or single_word",
        ),
        (
            lambda f: edit_config(f, pad_token="<pad>") or (f / "special_tokens_map.json").unlink(),
            "no id for its special token '<pad>'",
        ),
        (
            lambda f: edit_config(f, eos_token=None) or (f / "special_tokens_map.json").unlink(),
            "'eos_token' is missing",
        ),
    ],
)
def test_broken_folders_are_refused(folder, breakage, message):
    breakage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_a_folder_without_image_tokens_is_refused(folder):
    (folder / "added_tokens.json").write_text("{}")
    edit_config(folder, added_tokens_decoder={}, additional_special_tokens=[])
    (folder / "special_tokens_map.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no token '<IMG_CONTEXT>'"):
        load_tokenizer(folder)
