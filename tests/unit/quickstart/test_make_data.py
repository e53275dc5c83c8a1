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

    for record in records(data, "train") + records(data, "eval"):
        message, answer = (turn["value"] for turn in record["conversations"])
        assert message.count(prose.MARK) == 1
        before, _, _ = message.partition(f" {prose.MARK}<image>")
        marked = before.count("<image>")
        assert message.count("<image>") == len(record["image"]) > marked
        assert answer == record["answer"] == record["image"][marked].split("_")[-2]


def test_train_and_eval_share_no_sheet_and_no_prose(data):
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
        before = message.partition(f" {prose.MARK}<image>")[0]
        assert before.count("<image>") == int(record["depth"] * len(record["image"]))
        assert 0 < len(tokenizer.encode(before)) < record["length"]


def positions(record, stride):
    """Positions that a document covers: one visual token of 64 is stride/64."""
    return record["length"] - len(record["image"]) * (64 - stride)


def test_the_smallest_step_keeps_documents_near_the_trained_positions(data):
    asked = {record["length"]: record for record in records(data, "eval")}
    covered = {stride: {n: positions(record, stride) for n, record in asked.items()} for stride in (1, 8, 64)}
    assert max(asked) == 16 * 512
    # The numbers of the readme; the last document has a few words more than it has images.
    assert covered[1] == {512: 71, 1024: 142, 2048: 221, 4096: 379, 8192: 632}
    assert covered[8] == {512: 120, 1024: 240, 2048: 424, 4096: 792, 8192: 1472}
    assert covered[64] == {n: n for n in asked}


def test_training_documents_have_different_shares_of_images(data):
    counts = {n: set() for n in (104, 176, 256, 512)}
    for record in records(data, "train"):
        counts[record["length"]].add(len(record["image"]))
    assert (counts[104], counts[176], counts[256]) == ({1}, {2}, {2, 3})
    assert counts[512] <= set(range(2, 8))
    assert len(counts[512]) > 2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(data, checkpoint, tmp_path):
    import make_data

    for name, seed in (("same", SMALL["seed"]), ("other", SMALL["seed"] + 1)):
        (tmp_path / name).mkdir()
        make_data.write_data(tmp_path / name, checkpoint, **{**SMALL, "seed": seed})
    for file in ("train.jsonl", "eval.jsonl", "sheets/train_7_03.png"):
        assert (tmp_path / "same" / file).read_bytes() == (data / file).read_bytes()
    assert (tmp_path / "other" / "train.jsonl").read_bytes() != (data / "train.jsonl").read_bytes()


def test_a_sheet_is_one_tile_of_64_samples_of_its_digit(data):
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = np.round(source.images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(grey)) % 6 == 0
    for split, mine in (("train", ~held_out), ("held_out", held_out)):
        known = {each.tobytes() for each in grey[mine & (source.target == 3)]}
        with Image.open(data / "sheets" / f"{split}_3_00.png") as image:
            assert image.size == (64, 64)
            pixels = np.asarray(image)
        cells = {pixels[y : y + 8, x : x + 8].tobytes() for y in range(0, 64, 8) for x in range(0, 64, 8)}
        assert cells <= known
        assert len(cells) > 10


def test_a_length_without_room_for_prose_is_refused(checkpoint):
    import make_data

    source = make_data.load_source("train", load_tokenizer(checkpoint))
    writer = make_data.DocumentWriter(
        load_tokenizer(checkpoint), template="internlm2-chat", tokens_per_tile=64, source=source
    )
    with pytest.raises(ValueError, match="no passage"):
        writer.record(np.random.default_rng(0), length=90, depth=0.5, num_images=1, name="short")
