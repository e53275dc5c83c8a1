"""The quickstart's data is what it says: exact lengths, one needle, nothing shared between the splits."""

import json

import numpy as np
import pytest

from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.mixture import measure

SMALL = {"seed": 3, "tokens_per_length": 4096, "eval_share": 0.05}


@pytest.fixture(scope="module")
def data(checkpoint, tmp_path_factory):
    import make_data

    folder = tmp_path_factory.mktemp("data")
    make_data.write_data(folder, checkpoint, **SMALL)
    return folder


def records(folder, name):
    return [values for _, values in read_jsonl(folder / f"{name}.jsonl")]


def test_the_training_loader_counts_the_stated_lengths(data, checkpoint):
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import DataConfig, RunConfig
    from megatron_v2pe.data.samples.settings import sample_settings
    from megatron_v2pe.data.sources.meta import read_meta

    arch = read_architecture(checkpoint)
    settings = sample_settings(RunConfig(data=DataConfig(max_sample_tokens=8192)), arch, checkpoint)
    (entry,) = read_meta(data / "train_meta.json")
    for name in ("train", "eval"):
        lines = (data / f"{name}.jsonl").read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            stated = json.loads(line)
            measured = measure(line, number, entry=entry, settings=settings)
            assert measured.num_tokens == stated["length"]
            assert measured.num_tiles == len(stated["image"])
            assert measured.num_supervised == 2  # the digit and the end of the turn


def test_the_needle_is_marked_once_and_is_the_answer(data):
    import prose
    from sklearn.datasets import load_digits

    values = load_digits().target
    for record in records(data, "train") + records(data, "eval"):
        message, answer = (turn["value"] for turn in record["conversations"])
        assert message.count(prose.MARK) == 1
        before, _, _ = message.partition(f" {prose.MARK}<image>")
        marked = before.count("<image>")
        assert message.count("<image>") == len(record["image"]) > marked
        shown = int(record["image"][marked].removeprefix("digits/").removesuffix(".png"))
        assert answer == record["answer"] == str(values[shown])


def test_train_and_eval_share_no_digit_and_no_prose(data):
    shown = {
        name: {image for record in records(data, name) for image in record["image"]}
        for name in ("train", "eval")
    }
    assert shown["train"]
    assert shown["eval"]
    assert not shown["train"] & shown["eval"]

    def passages(name, size):
        for record in records(data, name):
            words = record["conversations"][0]["value"].replace("<image>", "").split()[:-4]
            yield from (" ".join(words[i : i + size]) for i in range(len(words) - size))

    # Idioms of a reference manual recur; whole passages must not.
    assert not set(passages("train", 25)) & set(passages("eval", 25))


def test_topics_are_split_without_overlap():
    from pydoc_data.topics import topics

    import prose

    train, held_out = (set(prose.split_topics(split)) for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(topics)
    assert len(train) > 3 * len(held_out) > 0


def test_lengths_and_depths_form_a_full_grid(data):
    import make_data

    found = {(record["length"], record["depth"]) for record in records(data, "eval")}
    assert found == {
        (length, depth) for length in make_data.EVAL_RECORDS_PER_CELL for depth in make_data.DEPTHS
    }
    assert {record["length"] for record in records(data, "train")} == set(make_data.TRAIN_LENGTHS)


def test_depth_says_where_the_needle_is(data, checkpoint):
    import prose

    tokenizer = load_tokenizer(checkpoint)
    for record in records(data, "eval"):
        message = record["conversations"][0]["value"]
        place = len(tokenizer.encode(message.partition(f" {prose.MARK}<image>")[0]))
        # `<image>` counts a few tokens as text and six as an image, so compare within the text.
        assert place / len(tokenizer.encode(message)) == pytest.approx(record["depth"], abs=0.08)


def test_images_grow_with_the_length(data):
    counts = {record["length"]: len(record["image"]) for record in records(data, "eval")}
    assert counts[4096] == pytest.approx(8 * counts[512], rel=0.08)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(data, checkpoint, tmp_path):
    import make_data

    for name, seed in (("same", SMALL["seed"]), ("other", SMALL["seed"] + 1)):
        (tmp_path / name).mkdir()
        make_data.write_data(tmp_path / name, checkpoint, **{**SMALL, "seed": seed})
    for file in ("train.jsonl", "eval.jsonl", "digits/0007.png"):
        assert (tmp_path / "same" / file).read_bytes() == (data / file).read_bytes()
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (data / "train.jsonl").read_bytes()


def test_digits_are_one_tile_and_look_like_the_source(data):
    from PIL import Image
    from sklearn.datasets import load_digits

    with Image.open(data / "digits" / "0003.png") as image:
        assert image.size == (56, 56)
        pixels = np.asarray(image)
    assert np.array_equal(np.round(pixels[3::7, 3::7] / 255 * 16), load_digits().images[3])


def test_a_length_without_room_for_prose_is_refused(checkpoint):
    import make_data

    source = make_data.load_source("train", load_tokenizer(checkpoint))
    writer = make_data.DocumentWriter(
        load_tokenizer(checkpoint), template="internlm2-chat", tokens_per_tile=4, source=source
    )
    with pytest.raises(ValueError, match="no passage"):
        writer.record(np.random.default_rng(0), length=30, depth=0.5, name="short")
