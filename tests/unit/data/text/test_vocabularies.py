"""Vocabularies of the families: what is special to each, and folders that are broken."""

import json
import pickle
import shutil

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_v2pe.core.errors import CheckpointError, DataError
from megatron_v2pe.data.text.byte_level import ByteLevelVocabulary
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.tokenizers import FOLDERS, TOKENIZERS

TEXTS = ["", " ", "a stone bridge\n\n", "<img></img> left  and right", "\u56fe\u4e2d caf\u00e9", "don't 1998"]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_pickled_copies_are_equal(family):
    tokenizer = TOKENIZERS[family]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    ids = tokenizer.encode("<img> the<|im_end|><|end|> river")
    assert copy.decode(ids) == tokenizer.decode(ids)
    assert (copy.fingerprint, copy.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)


def test_fingerprints_differ():
    assert len({tokenizer.fingerprint for tokenizer in TOKENIZERS.values()}) == len(TOKENIZERS)


@pytest.mark.parametrize(
    ("family", "ids"), [("qwen2", (None, 590, 588)), ("yi", (1, 7, 0)), ("phi3", (1, 588, 588))]
)
def test_roles(family, ids):
    tokenizer = TOKENIZERS[family]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ids


def test_only_phi3_starts_with_its_beginning_of_sequence():
    starts = {name: TOKENIZERS[name].encode("the river")[0] for name in ("qwen2", "yi", "phi3")}
    assert starts["phi3"] == TOKENIZERS["phi3"].bos_id
    assert starts["yi"] != TOKENIZERS["yi"].bos_id


def test_chat_tokens_of_phi3_swallow_the_blanks_behind_them():
    phi3, yi = TOKENIZERS["phi3"], TOKENIZERS["yi"]
    assert phi3.encode("<|user|> \n\t the") == phi3.encode("<|user|>the")
    assert phi3.encode("<img> \n the") != phi3.encode("<img>the")
    assert yi.encode("<|im_start|>\nthe") != yi.encode("<|im_start|>the")


def test_marks_behind_swallowed_blanks():
    tokenizer = TOKENIZERS["phi3"]
    text = "<|user|>\n \nthe river<|end|>"
    ids, places = tokenizer.encode_marked(text, [8, 9, text.index("the"), text.index("<|end|>"), len(text)])
    first = ids.index(tokenizer.token_id("<|user|>")) + 1
    assert places == [first, first, first, len(ids) - 1, len(ids)]


def test_the_word_mark_in_front_goes_before_special_tokens_only():
    tokenizer = TOKENIZERS["phi3"]  # <|user|> is an added token there, but not a special one
    assert tokenizer.tokenize("<img>a") == ["<img>", "a"]
    assert tokenizer.tokenize("<|user|>a") == ["\u2581", "<|user|>", "a"]
    assert tokenizer.encode_marked("<img>a", [0, 5])[1] == [1, 2]


def test_qwen2_composes_characters():
    tokenizer = TOKENIZERS["qwen2"]
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9"


def test_a_combining_character_does_not_break_a_special_token():
    # Composed as one string the bracket and the stroke would be one character, and the tag would be gone.
    tokenizer = TOKENIZERS["qwen2"]
    assert tokenizer.encode("</img>\u0338")[0] == tokenizer.token_id("</img>")


def edit(folder, name, change):
    path = folder / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("family", "breakage", "message"),
    [
        ("qwen2", lambda f: (f / "vocab.json").unlink(), "vocab.json: no such file"),
        ("qwen2", lambda f: (f / "merges.txt").unlink(), "merges.txt: no such file"),
        ("qwen2", lambda f: edit(f, "vocab.json", lambda v: v.pop("a")), "1 of the 256 byte letters"),
        ("qwen2", lambda f: (f / "merges.txt").write_text("a b c"), "'a b c' is not a pair"),
        ("qwen2", lambda f: (f / "merges.txt").write_text("q zz"), "merges.txt: does not fit vocab.json"),
        (
            "qwen2",
            lambda f: (f / "merges.txt").write_text("q q"),
            "no entry 'qq' for the merge of 'q' and 'q'",
        ),
        ("yi", lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
        ("phi3", lambda f: (f / "tokenizer.model").write_bytes(b"no"), "not a sentencepiece model"),
    ],
)
def test_broken_folders_are_refused(tmp_path, family, breakage, message):
    folder = tmp_path / "hf"
    shutil.copytree(FOLDERS[family], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    breakage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.fixture
def llama3(tmp_path):
    """A folder as of Llama-3: everything in tokenizer.json, and the library's own tokenizer of that file."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the river runs past the old stone bridge"] * 9, trainer)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS]
    backend.add_special_tokens(special)
    start = (special[0], backend.token_to_id(special[0]))
    backend.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "additional_special_tokens": special[2:],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path, backend


def test_a_tokenizer_json_gives_the_ids_of_its_library(llama3):
    folder, backend = llama3
    tokenizer = load_tokenizer(folder)
    chat = "<|im_start|>user\nthe <img><IMG_CONTEXT></img> bridge<|im_end|>"
    for text in [*TEXTS, chat]:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.encode(text, add_bos=False) == backend.encode(text, add_special_tokens=False).ids
        ids = backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == backend.decode(ids)


def test_a_tokenizer_json_of_another_kind_is_refused(llama3):
    folder, _ = llama3
    edit(folder, "tokenizer.json", lambda values: values.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(CheckpointError, match="pre_tokenizer is neither ByteLevel nor"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"pre_tokenizer": "ByteLevel"}')
    with pytest.raises(CheckpointError, match="cannot be read by the tokenizers library"):
        load_tokenizer(folder)


def test_a_text_at_which_the_expression_for_words_gives_up_is_refused():
    """The library ends in a panic there, which is no Exception and would end a server or a loader."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "!": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), behavior="isolated")
    vocabulary = ByteLevelVocabulary(backend, composes=False, digest=b"")
    assert vocabulary.encode("aa") == [0, 0]
    with pytest.raises(DataError, match=r"cannot cut a text of 31 characters into words .*retry-limit"):
        vocabulary.encode("a" * 30 + "!")
    with pytest.raises(DataError, match="cannot cut a text"):
        vocabulary.entries("a" * 30 + "!")
