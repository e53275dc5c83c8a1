"""A whole evaluation with a stand-in model: a staircase in, the same staircase out."""

import json

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.retrieval.questions import Answer, Share, parse_strides, read_items, score
from megatron_v2pe.evaluation.retrieval.runner import (
    claim_folder,
    describe_subject,
    run_strides,
    write_evaluation,
)

DEPTHS, LENGTHS = (0.1, 0.5, 0.9), (512, 1024)


class TailReader:
    """Remembers the last `memory` tokens of a document, twice as many with stride 1."""

    def __init__(self, memory, share=None):
        self.memory, self.log, self.asked = memory, [], []
        self.share = share or Share()

    def prepare(self, setting):
        self.log.append(setting.name)
        return self.share

    def answer(self, item, setting):
        assert self.log[-1] == setting.name
        self.asked.append((setting.name, item.item_id))
        reach = self.memory * (2 if setting.stride == 1 else 1)
        return Answer(text=item.answer if (1 - item.depth) * item.length <= reach else "?")

    def close(self):
        self.log.append("closed")


@pytest.fixture
def items(tmp_path):
    lines = [
        json.dumps(
            {
                "id": f"{length}-{depth}-{n}",
                "image": ["a.png"],
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": str(n)}],
                "length": length,
                "depth": depth,
            }
        )
        for length in LENGTHS
        for depth in DEPTHS
        for n in range(2)
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(lines))
    return read_items(path)


@pytest.fixture
def arch(request):
    golden = sorted((request.config.rootpath / "tests" / "golden").rglob("a_internlm2_vit300m/config.json"))
    values = json.loads(golden[0].read_text())
    values["llm_config"]["max_position_embeddings"] = 512
    return parse_architecture(values)


def test_a_reader_of_the_tail_gives_a_staircase(items, arch, tmp_path, capsys):
    settings = parse_strides("default,1", tokens_per_tile=4)
    found = run_strides(items, settings=settings, answerer=TailReader(512), folder=tmp_path)
    right = {
        name: {(c.length, c.depth): c.accuracy for c in score(own) if c.accuracy}
        for name, own in found.items()
    }
    assert set(right["default"]) == {(512, 0.1), (512, 0.5), (512, 0.9), (1024, 0.5), (1024, 0.9)}
    assert len(right["1"]) == 6
    text = write_evaluation(found, folder=tmp_path, arch=arch)
    assert text.splitlines()[2].split() == ["default", "1.000", "0.667"]
    written = {path.name for path in tmp_path.iterdir()}
    assert {"table.txt", "cells.csv", "accuracy_by_length.png"} <= written
    assert {"heatmap_default.png", "heatmap_1.png", "predictions_default.jsonl"} <= written
    assert "loss.png" not in written
    assert capsys.readouterr().err.count("\r") == 0  # no bar without a terminal


def test_an_interrupted_evaluation_asks_only_what_is_open(items, tmp_path):
    settings = parse_strides("default,1,2", tokens_per_tile=4)
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    scores = run_strides(items, settings=settings, answerer=TailReader(512), folder=whole)
    for name, kept in (("default", 12), ("1", 5)):  # killed in the middle of the second stride
        lines = (whole / f"predictions_{name}.jsonl").read_text().splitlines(keepends=True)
        (again / f"predictions_{name}.jsonl").write_text("".join(lines[:kept]))
    reader = TailReader(512)
    assert run_strides(items, settings=settings, answerer=reader, folder=again) == scores
    assert reader.log == ["1", "2", "closed"]
    assert [name for name, _ in reader.asked] == ["1"] * 7 + ["2"] * 12
    for setting in settings:
        name = f"predictions_{setting.name}.jsonl"
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_processes_share_the_questions(items, tmp_path):
    settings = parse_strides("default", tokens_per_tile=4)
    readers = [TailReader(512, Share(index=index, count=3)) for index in range(3)]
    shares = []
    for rank, reader in enumerate(readers):
        folder = tmp_path / str(rank)  # one each: here the processes do not start at the same time
        folder.mkdir()
        run_strides(items, settings=settings, answerer=reader, folder=folder)
        shares.append({name for _, name in reader.asked})
    assert sorted(name for share in shares for name in share) == sorted(item.item_id for item in items)
    for share in shares:
        assert {length: sum(f"{length}-" in name for name in share) for length in LENGTHS} == dict.fromkeys(
            LENGTHS, 2
        )


def test_other_ranks_of_a_replica_answer_and_write_nothing(items, tmp_path):
    settings = parse_strides("default", tokens_per_tile=4)
    reader = TailReader(512, Share(is_writer=False))
    assert run_strides(items, settings=settings, answerer=reader, folder=tmp_path) == {"default": []}
    assert len(reader.asked) == len(items)
    assert not (tmp_path / "predictions_default.jsonl").exists()


def subject(tmp_path, *, options="float32"):
    checkpoint, data = tmp_path / "step", tmp_path / "data.jsonl"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    data.write_text("{}")
    return describe_subject(checkpoint, data, options=options)


def test_a_folder_belongs_to_one_evaluation(tmp_path):
    first = subject(tmp_path)
    claim_folder(tmp_path / "out", first)
    claim_folder(tmp_path / "out", first)
    with pytest.raises(ConfigError, match="whose options is 'float32'"):
        claim_folder(tmp_path / "out", subject_with(first, options="bfloat16"))
    with pytest.raises(ConfigError, match="data_digest"):
        claim_folder(tmp_path / "out", subject_with(first, data_digest="other"))


def subject_with(first, **changes):
    import dataclasses

    return dataclasses.replace(first, **changes)


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        claim_folder(tmp_path / "file" / "out", subject(tmp_path))
