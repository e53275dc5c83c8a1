"""A whole run: exact lengths by the loader's own count, the same bytes from any workers, disjoint splits, resume."""

import dataclasses
import multiprocessing
import os
import re
import signal
import time

import psutil
import pytest

from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.sources.meta import read_meta
from megatron_v2pe.evaluation.retrieval.questions import read_items
from megatron_v2pe.synthesis import parts
from megatron_v2pe.synthesis.kinds import GROUPS, KINDS
from megatron_v2pe.synthesis.run import synthesize
from tests.support.synthesis import config_for, read_lines, settings_of, tree
from tests.support.tokenizers import FOLDERS

HF = FOLDERS["internlm2"]
DATA = DataConfig()


@pytest.fixture(scope="session")
def both_splits(inputs, tmp_path_factory):
    """Folders of all kinds, by split."""
    made = {}
    for split in ("train", "eval"):
        made[split] = tmp_path_factory.mktemp("made") / split
        config = config_for(inputs, made[split], KINDS, split=split, count=5)
        assert synthesize(config, hf_folder=HF, data=DATA).num_new == 5 * len(KINDS)
    return made


def test_the_loader_finds_every_sample_exactly_as_long_as_asked(both_splits, tmp_path):
    for folder in both_splits.values():
        for entry in read_meta(folder / "meta.json"):
            index = index_dataset(entry, settings=settings_of(), cache_dir=tmp_path)
            assert index.bad == ()
            assert index.num_tokens.tolist() == [1200] * 5


def test_evaluate_reads_what_was_made(both_splits):
    items = read_items(both_splits["eval"] / "meta.json")
    assert len(items) == 5 * len(KINDS)
    assert {item.length for item in items} == {1200}
    one_kind = read_items(both_splits["eval"] / "text-retrieval.jsonl")
    assert [item.depth for item in one_kind] == [0.1, 0.3, 0.5, 0.7, 0.9]


def test_mm_niah_records_have_one_image_for_each_placeholder(both_splits):
    folder = both_splits["eval"] / "mm_niah"
    names = {
        f"{task}-{medium}.jsonl"
        for task in ("retrieval", "counting", "reasoning")
        for medium in ("text", "image")
    }
    extra = {
        f"retrieval-{medium}-{kind}.jsonl" for medium in ("text", "image") for kind in ("decoys", "absent")
    }
    assert {path.name for path in folder.iterdir()} == names | extra
    assert not (both_splits["train"] / "mm_niah").exists()
    for path in folder.iterdir():
        for record in read_lines(path):
            assert set(record) == {"id", "images_list", "context", "question", "answer", "meta"}
            prompt = record["context"] + record["question"]
            assert prompt.count("<image>") == len(record["images_list"]) == record["meta"]["num_images"]
            assert isinstance(
                record["answer"],
                {"retrieval": (str, int), "counting": list, "reasoning": (str, int)}[path.name.split("-")[0]],
            )
            for name in [*record["images_list"], *(record["meta"]["choices_image_path"] or [])]:
                assert (both_splits["eval"] / name).is_file()


def test_splits_share_no_image_no_sentence_and_no_needle(both_splits, inputs):
    records = {
        split: [record for kind in KINDS for record in read_lines(folder / f"{kind}.jsonl")]
        for split, folder in both_splits.items()
    }
    sources = {path.read_bytes() for path in (inputs / "images").iterdir()}
    shown, said, hidden = {}, {}, {}
    for split, folder in both_splits.items():
        files = {name for record in records[split] for name in record.get("image", [])}
        shown[split] = {
            content for content in ((folder / name).read_bytes() for name in files) if content in sources
        }
        contexts = [r["conversations"][0]["value"][: r["meta"]["context_chars"]] for r in records[split]]
        said[split] = {
            s for text in contexts for s in re.split(r"\.\s+", text) if len(s) > 60 and "<image>" not in s
        }
        hidden[split] = {n for r in records[split] for n in r["meta"]["needles"] + r["meta"]["decoys"]} - {
            "image"
        }
    for kind in (shown, said, hidden):
        assert kind["train"]
        assert kind["eval"]
        assert kind["train"].isdisjoint(kind["eval"])


def test_answers_follow_from_the_needles(both_splits):
    for record in read_lines(both_splits["train"] / "text-retrieval.jsonl"):
        (needle,) = record["meta"]["needles"]
        answer = record["conversations"][1]["value"]
        assert answer in needle
        assert record["conversations"][0]["value"].count(needle) == 1
    for record in read_lines(both_splits["train"] / "text-counting.jsonl"):
        context = record["conversations"][0]["value"]
        found = [int(n) for n in re.findall(r"counted (\d+) ", context)]
        assert str(found) == record["conversations"][1]["value"]
    for record in read_lines(both_splits["train"] / "text-absent.jsonl"):
        assert record["conversations"][1]["value"] == "none"
        key = re.search(r"of (\w+)", record["meta"]["question"]).group(1)
        assert key not in record["conversations"][0]["value"][: record["meta"]["context_chars"]]
    for record in read_lines(both_splits["train"] / "image-counting.jsonl"):
        assert len(record["meta"]["answer"]) == record["meta"]["num_images"]
        assert sum(map(bool, record["meta"]["answer"])) == len(record["meta"]["needles"])


def test_long_questions_name_the_right_image(both_splits, inputs):
    sources = {path.read_bytes(): path.name for path in (inputs / "images").iterdir()}
    names = sorted(sources.values())
    for record in read_lines(both_splits["train"] / "longvqa-pages.jsonl"):
        number = int(re.search(r"about image (\d+)\.", record["meta"]["question"]).group(1))
        shown = (both_splits["train"] / record["image"][number - 1]).read_bytes()
        assert re.search(r"(\d+)$", record["conversations"][1]["value"]).group(1) == str(
            names.index(sources[shown])
        )


def test_any_number_of_workers_writes_the_same_bytes(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MOST_SAMPLES", 2)
    for workers in (1, 2):
        config = config_for(inputs, tmp_path / str(workers), GROUPS["needles"], workers=workers)
        synthesize(config, hf_folder=HF, data=DATA)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    other = config_for(inputs, tmp_path / "3", GROUPS["needles"], seed=1)
    synthesize(other, hf_folder=HF, data=DATA)
    assert (tmp_path / "3" / "text-retrieval.jsonl").read_bytes() != tree(tmp_path / "1")[
        "text-retrieval.jsonl"
    ]


def make_slowly(config):
    parts.MOST_SAMPLES = 1
    synthesize(config, hf_folder=HF, data=DATA)


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(inputs, tmp_path, monkeypatch):
    config = config_for(inputs, tmp_path / "killed", ("image-decoys",), count=40, workers=2)
    process = multiprocessing.get_context("spawn").Process(target=make_slowly, args=(config,))
    process.start()
    deadline = time.monotonic() + 60
    while (
        len(list((tmp_path / "killed").glob("unfinished/part-*.jsonl"))) < 3 and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert psutil.wait_procs(workers, timeout=30)[1] == [], "workers outlive the run"
    finished = len(list((tmp_path / "killed").glob("unfinished/part-*.jsonl")))
    assert len(workers) >= 3  # two, and the server that forks them
    assert 3 <= finished < 40
    monkeypatch.setattr(parts, "MOST_SAMPLES", 1)
    assert synthesize(config, hf_folder=HF, data=DATA).num_new == 40 - finished
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    synthesize(whole, hf_folder=HF, data=DATA)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert synthesize(config, hf_folder=HF, data=DATA).num_new == 0


@pytest.mark.parametrize("family", sorted(FOLDERS))
def test_lengths_are_exact_with_every_kind_of_tokenizer(inputs, tmp_path, family):
    config = config_for(inputs, tmp_path / "out", ("text-decoys", "image-retrieval"), lengths=(901, 1500))
    synthesize(config, hf_folder=FOLDERS[family], data=DATA)
    for entry in read_meta(tmp_path / "out" / "meta.json"):
        index = index_dataset(entry, settings=settings_of(family), cache_dir=tmp_path / "cache")
        assert index.num_tokens.tolist() == [901, 901, 1500, 1500]


def test_another_command_in_the_same_folder_is_refused(inputs, tmp_path):
    config = config_for(inputs, tmp_path / "out")
    synthesize(config, hf_folder=HF, data=DATA)
    with pytest.raises(ConfigError, match="holds data whose seed is 0, not 1"):
        synthesize(dataclasses.replace(config, seed=1), hf_folder=HF, data=DATA)
    with pytest.raises(ConfigError, match="whose tiling is"):
        synthesize(config, hf_folder=HF, data=DataConfig(max_dynamic_patch=6))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="was not made by synthesize"):
        synthesize(dataclasses.replace(config, out=str(tmp_path / "mine")), hf_folder=HF, data=DATA)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_length_that_cannot_work_does_not_keep_the_folder(inputs, tmp_path):
    short = config_for(inputs, tmp_path / "out", lengths=(30,))
    with pytest.raises(DataError, match="30 is too short for text-retrieval"):
        synthesize(short, hf_folder=HF, data=DATA)
    assert synthesize(dataclasses.replace(short, lengths=(400,)), hf_folder=HF, data=DATA).num_new == 2


def test_unusable_files_are_left_out_and_listed(inputs, tmp_path):
    for name in ("texts", "images"):
        (tmp_path / name).mkdir()
        for path in (inputs / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "texts" / "nothing.txt").write_bytes(b"")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    config = config_for(
        inputs, tmp_path / "out", texts=str(tmp_path / "texts"), images=str(tmp_path / "images")
    )
    synthesize(config, hf_folder=HF, data=DATA)
    skipped = (tmp_path / "out" / "skipped.txt").read_text()
    assert "latin.txt: not UTF-8 text" in skipped
    assert "nothing.txt: has no text" in skipped
    assert "broken.png: cannot be read as an image" in skipped


def test_missing_material_is_an_error(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"texts": str(tmp_path / "empty")}, "--texts: .* holds no file that ends with"),
        ({"texts": str(tmp_path / "nowhere")}, "--texts: .* no such folder"),
        ({"images": str(tmp_path / "empty")}, "--images: .* holds no file"),
        ({"held_out": 1e-9, "split": "eval"}, "falls into split 'eval'"),
    ):
        config = config_for(inputs, tmp_path / "out", **changes)
        with pytest.raises(DataError, match=message):
            synthesize(config, hf_folder=HF, data=DATA)
