"""The model as an answerer: it is asked exactly what training would have shown it."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.core.errors import CheckpointError, DataError
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.evaluation.retrieval import loaded_engine
from megatron_v2pe.evaluation.retrieval.answerer import EngineAnswerer
from megatron_v2pe.evaluation.retrieval.questions import parse_strides, read_items
from tests.support.mixture import measure
from tests.support.videos import frame_number, write_frames

FAMILY = "a_internlm2_vit300m"


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("answerer") / "imported"
    import_hf(request.config.rootpath / "tests" / "golden" / "ckpt" / FAMILY, target)
    return target


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (112, 112)), ("b.png", (240, 112))):
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    records = [
        {
            "id": f"q{n}",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "human", "value": f" one <image> two <image> which {n}? "},
                {"from": "gpt", "value": "7"},
            ],
            "length": 100 * n,
            "depth": 0.5,
        }
        for n in (1, 2)
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(checkpoint, **data):
    return EngineAnswerer(checkpoint, data=DataConfig(**data), dtype="float32", max_new_tokens=3)


def test_the_prompt_is_the_training_sample_without_its_answer(checkpoint, data):
    from megatron_v2pe.checkpoint.files.folder import hf_path
    from megatron_v2pe.data.media.medium import load_tile_range
    from megatron_v2pe.data.samples.draw import Draw, read_sample
    from megatron_v2pe.data.samples.settings import sample_settings
    from megatron_v2pe.data.sources.meta import DatasetEntry

    answerer = make(checkpoint)
    (setting,) = parse_strides("2", tokens_per_tile=answerer.arch.tokens_per_tile)
    prompt = answerer.prompt(read_items(data)[0], setting)

    settings = sample_settings(RunConfig(), answerer.arch, hf_path(checkpoint))
    entry = DatasetEntry(
        name="t",
        annotation=str(data),
        root=str(data.parent),
    )
    line = data.read_bytes().splitlines()[0]
    sizes = measure(line, 1, entry=entry, settings=settings).sizes
    sample = read_sample(line, 1, sizes, entry=entry, settings=settings, draw=Draw(epoch=0))
    num_prompt = int((sample.labels < 0).sum())
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[:num_prompt])
    assert prompt.layout.num_tokens == num_prompt
    np.testing.assert_array_equal(prompt.layout.image_starts, sample.layout.image_starts)
    assert prompt.layout.num_tiles.tolist() == [1, 3]  # 240 x 112 is cut in two, and has a thumbnail
    assert prompt.layout.strides.tolist() == [2, 2]
    tiles = load_tile_range(sample.media, image_size=answerer.arch.image_size, tile_range=(0, 4))
    np.testing.assert_array_equal(prompt.tiles.load(0, 4), tiles)


def test_limits_of_the_data_set_come_before_those_of_the_command(checkpoint, data):
    answerer = make(checkpoint)
    (setting,) = parse_strides("default", tokens_per_tile=answerer.arch.tokens_per_tile)
    meta = {"annotation": data.name, "root": ".", "repeat_time": 1, "data_augment": False}
    for limits, num_tiles in (
        ({"max_dynamic_patch": 1}, [1, 1]),
        ({"dynamic_image_size": False}, [1, 1]),
        ({}, [1, 3]),
    ):
        (data.parent / "meta.json").write_text(json.dumps({"e": {**meta, **limits}}))
        prompt = answerer.prompt(read_items(data.parent / "meta.json")[0], setting)
        assert prompt.layout.num_tiles.tolist() == num_tiles


def test_a_video_is_asked_about_by_its_middle_frames(checkpoint, tmp_path):
    """Four of eight frames, one tile each, in every evaluation the same."""
    write_frames(tmp_path / "film", 8)
    conversation = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "7"}]
    values = {"id": "q", "video": "film/", "conversations": conversation, "length": 99, "depth": 0.5}
    (tmp_path / "e.jsonl").write_text(json.dumps(values) + "\n")
    answerer = make(checkpoint, max_num_frame=4)
    (setting,) = parse_strides("2", tokens_per_tile=answerer.arch.tokens_per_tile)
    (item,) = read_items(tmp_path / "e.jsonl")
    prompt, again = (answerer.prompt(item, setting) for _ in range(2))
    assert [frame_number(tile) for tile in prompt.tiles.load(0, 4)] == [0, 2, 4, 6]
    assert prompt.layout.num_tiles.tolist() == [1, 1, 1, 1]
    assert np.array_equal(prompt.tiles.load(0, 4), again.tiles.load(0, 4))
    assert np.array_equal(prompt.tokens, again.tokens)


def test_a_missing_image_is_named(checkpoint, data):
    (data.parent / "b.png").unlink()
    answerer = make(checkpoint)
    (setting,) = parse_strides("default", tokens_per_tile=answerer.arch.tokens_per_tile)
    with pytest.raises(DataError, match=r"b\.png"):
        answerer.prompt(read_items(data)[0], setting)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        make(tmp_path)


def test_the_command_evaluates_reports_and_continues(checkpoint, data, tmp_path, capsys, monkeypatch):
    arguments = ["evaluate", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    arguments += ["--strides", "default,1", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[0].split()[0] == "stride"
    answers = {
        name: [values for _, values in read_jsonl(tmp_path / "out" / f"predictions_{name}.jsonl")]
        for name in ("default", "1")
    }
    assert [len(rows) for rows in answers.values()] == [2, 2]
    assert (tmp_path / "out" / "heatmap_1.png").stat().st_size > 5000

    def no_model(*_args, **_kwargs):
        raise AssertionError("everything is answered, no model is needed")

    monkeypatch.setattr(loaded_engine.Engine, "load", no_model)
    assert main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--strides", "99"], "--strides"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_arguments_exit_with_two_and_leave_nothing(checkpoint, data, tmp_path, capsys, changes, message):
    arguments = ["evaluate", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out"), *changes]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
