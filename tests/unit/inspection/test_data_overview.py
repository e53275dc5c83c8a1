"""index-data and show-sample from the command line: tables, pictures, mistakes."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.inspection import data_pictures
from megatron_v2pe.inspection.sample_view import view_pack
from megatron_v2pe.parallel.zigzag import shard_indices
from tests.support.mixture import HF_FOLDER, filled_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return filled_mixture(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_file(mixture):
    config = {
        "model": {"hf_path": str(HF_FOLDER)},
        "data": {
            "meta": str(mixture.folder / "meta.json"),
            "max_pack_tokens": 2048,
            "max_sample_tokens": 1024,
            "max_dynamic_patch": 4,
        },
        "position": {"mode": "v2pe_random"},
        "optim": {"steps": 9, "global_batch_size": 4},
        "runtime": {"run_dir": str(mixture.folder / "run")},
    }
    path = mixture.folder / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_index_data_describes_a_run(run_file, tmp_path, capsys):
    assert main(["index-data", str(run_file), "--workers", "1", "--report", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "24 samples, 0 bad" in shown
    assert "an epoch draws 32 samples" in shown  # 16 x 1.5 + 8
    assert "step of 4 packs on 2 data parallel ranks" in shown
    with open(tmp_path / "out" / "datasets.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert (rows["a"]["samples"], rows["a"]["draws"], rows["b"]["draws"]) == ("16", "24", "8")
    with open(tmp_path / "out" / "packs.csv", newline="") as file:
        assert sum(int(row["samples"]) for row in csv.DictReader(file)) == 32
    for name in ("lengths", "tiles", "sources", "packing", "imbalance"):
        picture = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("L"))
        assert picture.min() < 100 < 250 < picture.max()
    assert not list(mixture_files(run_file, "*.jsonl.*"))


def test_counts_of_a_few_samples_are_read_off_right():
    """One bar for each number of tiles, and no tick between two numbers of samples."""
    index = SimpleNamespace(num_tiles=np.array([0, 1, 1, 7, 8, 13, 13, 13, 13, 13]))
    axis = data_pictures._tiles([index]).axes[0]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axis.patches}
    assert len(heights) == 13
    assert {tiles: height for tiles, height in heights.items() if height} == {1: 2, 7: 1, 8: 1, 13: 5}
    assert all(tick == round(tick) for tick in axis.get_yticks())


def mixture_files(run_file, pattern):
    return run_file.parent.glob(pattern)


def test_train_would_read_what_index_data_measured(run_file, mixture, monkeypatch):
    assert main(["index-data", str(run_file)]) == 0
    from megatron_v2pe.data.samples.measure import LineMeasurer

    monkeypatch.setattr(LineMeasurer, "__call__", None)  # would fail if it were called
    assert main(["index-data", str(run_file), "data.balance=false", "data.packing=release_greedy"]) == 0


def test_a_meta_json_without_a_run(mixture, tmp_path, capsys):
    meta, cache = mixture.folder / "meta.json", tmp_path / "cache"
    arguments = ["--meta", str(meta), "--checkpoint", str(HF_FOLDER), "--workers", "1"]
    assert main(["index-data", *arguments]) == 2
    assert "no place to keep what is measured: give --cache-dir" in capsys.readouterr().err
    assert main(["index-data", *arguments, "--cache-dir", str(cache), "data.max_dynamic_patch=2"]) == 0
    assert len(list(cache.glob("a-*/rows-*"))) == 1
    assert "a step has one pack" in capsys.readouterr().out
    assert main(["index-data", *arguments, "--cache-dir", str(cache), "optim.global_batch_size=2"]) == 0
    assert "a step has one pack" not in capsys.readouterr().out


def test_bad_lines_are_named_and_the_limit_is_kept(run_file, mixture, tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text('{"conversations": []}\n')
    meta = json.loads((mixture.folder / "meta.json").read_text())
    for each in meta.values():
        each |= {name: str(mixture.folder / each[name]) for name in ("annotation", "root")}
    meta["c"] = {"annotation": str(tmp_path / "c.jsonl"), "repeat_time": 1, "data_augment": False}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    arguments = [str(run_file), f"data.meta={tmp_path / 'meta.json'}", "--report", str(tmp_path / "out")]
    assert main(["index-data", *arguments, "--workers", "1"]) == 2
    captured = capsys.readouterr()
    assert f"bad: {tmp_path / 'c.jsonl'}:1: conversations must be" in captured.err
    assert "1 of 25 samples are bad, but data.max_bad_samples = 0.001 allows 0" in captured.err
    assert "(data.max_bad_samples=0.04 skips them)" in captured.err
    assert "24 samples, 1 bad" in captured.out
    assert "no epoch is planned, the error says why" in captured.out
    assert "an epoch draws" not in captured.out
    assert (tmp_path / "out" / "bad.txt").read_text().startswith("broken\tc:1\t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data is named"),
        (["--meta", "m.json"], "no checkpoint is named"),
        (["RUN", "--workers", "0"], "--workers is 0"),
        (["RUN", "data.cache_dir=/proc/none"], "give a folder that can be written"),
        (["RUN", "--report", __file__], "--report is "),
    ],
)
def test_mistakes_of_index_data(run_file, capsys, arguments, message):
    given = [str(run_file) if word == "RUN" else word for word in arguments]
    assert main(["index-data", *given]) == 2
    assert message in capsys.readouterr().err


def test_show_sample_draws_and_lists(run_file, tmp_path, capsys):
    arguments = [
        str(run_file),
        "--step",
        "2",
        "--micro-batch",
        "3",
        "--cp",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["show-sample", *arguments]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("step 2, micro batch 3 of 4: ")
    assert shown[-1] == str(tmp_path / "out" / "step2_micro_batch3.png")
    assert any("supervised" in line and "a thing" in line for line in shown)
    picture = Image.open(shown[-1])
    assert picture.width > 1000


def test_runs_cover_the_pack_and_name_their_owners(run_file, mixture):
    config = load(run_file)
    view = view_pack(config, read_architecture(HF_FOLDER), HF_FOLDER, step=1, micro_batch=0, cp=2)
    runs = [run for document in view.documents for run in document.runs]
    assert [run.start for run in runs[1:]] == [run.end for run in runs[:-1]]
    assert (runs[0].start, runs[-1].end) == (0, len(view.batch.tokens))
    supervised = sum(run.end - run.start for run in runs if run.kind == "supervised")
    assert supervised == int((view.batch.labels != -100).sum())
    held = shard_indices(view.batch.layout.cu_seqlens, cp=2, cp_rank=1)
    assert set(view.owners[held]) == {1}
    for document in view.documents:
        assert document.runs[0].first_position == 0
        images = [run for run in document.runs if run.kind == "image"]
        assert len(images) == len(document.images)
        for run, tiles, stride in zip(images, document.num_tiles, document.strides, strict=True):
            steps = tiles * view.tokens_per_tile - 1
            assert run.last_position - run.first_position == steps * stride / view.tokens_per_tile


def load(run_file):
    from megatron_v2pe.config.load import load_run_config

    return load_run_config(run_file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "--step is 0, but the run has steps 1 to optim.steps = 9"),
        (["--step", "10"], "--step is 10"),
        (["--micro-batch", "4"], "--micro-batch is 4, but step 1 has packs 0 to 3"),
        (["--cp", "0"], "--cp is 0"),
        (["--out", __file__], "--out is "),
    ],
)
def test_mistakes_of_show_sample(run_file, capsys, arguments, message):
    assert main(["show-sample", str(run_file), *arguments]) == 2
    assert message in capsys.readouterr().err
