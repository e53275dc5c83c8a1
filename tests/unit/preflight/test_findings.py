"""preflight: every rule that stops a run has a case that stops it, and one that does not."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.preflight import disk, inputs, limit, links, machine, parity
from megatron_v2pe.preflight.findings import Finding, findings_table, guarded, worst_verdict


def finding(verdict, name="x"):
    return Finding(name=name, verdict=verdict, text="text")


def test_the_table_ends_with_the_answer():
    assert findings_table([finding("go"), finding("note")], ranks=2, seconds=1.2).endswith(
        "GO: 2 ranks, checked in 1 s\n"
    )
    text = findings_table([finding("no-go", "disk"), finding("go", "links")], ranks=1, seconds=0)
    assert text.splitlines()[0] == "no-go  disk   text"
    assert text.splitlines()[-1].startswith("NO-GO: 1 rank,")


def test_a_no_go_is_worse_than_a_note():
    assert worst_verdict([finding("go"), finding("no-go"), finding("note")]) == "no-go"
    assert worst_verdict([finding("go"), finding("note")]) == "note"


def test_a_mistake_is_the_finding_of_its_check():
    def check():
        raise DataError("a.jsonl:3: broken")

    assert guarded("data", check) == Finding(name="data", verdict="no-go", text="a.jsonl:3: broken")


@pytest.mark.parametrize(
    ("gb_s", "expected", "verdict"),
    [(300, 360, "go"), (100, 360, "note"), (30, 360, "no-go"), (0.2, 0.1, "go"), (30, None, "note")],
)
def test_rates(gb_s, expected, verdict):
    assert links.judge_rate("all-reduce", gb_s, expected).verdict == verdict


@pytest.mark.parametrize(("seconds", "verdict"), [(0.01, "go"), (5, "note"), (3600, "no-go")])
def test_clocks(seconds, verdict):
    assert machine.judge_skew(seconds).verdict == verdict


def test_versions_must_be_equal():
    here = dict.fromkeys(machine.VERSIONS, "1")
    assert machine.compare_versions([here, dict(here)]).verdict == "go"
    found = machine.compare_versions([here, here, {**here, "apex": "2"}])
    assert found.verdict == "no-go"
    assert "apex: rank 0 has 1, rank 2 has 2" in found.text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04", 93784), ("02:03:04", 7384), ("3:04", 184), ("UNLIMITED", None), ("", None)],
)
def test_time_left(text, seconds):
    assert limit.seconds_left(text) == seconds


@pytest.mark.parametrize(
    ("steps", "step_seconds", "verdict"),
    [(100, 30, "go"), (1000, 30, "note"), (10, 7200, "no-go"), (0, 7200, "go")],
)
def test_time_limit(steps, step_seconds, verdict):
    assert limit.judge_time(steps, step_seconds, 3600).verdict == verdict


def config_of(tmp_path, **runtime):
    config = load_run_config(None, [f"runtime.run_dir={tmp_path}", "optim.steps=100"])
    return replace(config, runtime=replace(config.runtime, **runtime))


def test_the_time_of_a_step_comes_from_the_run_folder(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "not known yet" in limit.check_limit(config, None, left="10:00").text
    lines = [json.dumps({"step": step, "step_s": 1.5, "data_s": 0.5}) for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = limit.check_limit(config, 99.0, left="10:00")
    assert "60 steps of 2 s need 0.03 h" in found.text
    assert found.verdict == "go"


def test_the_limit_of_a_process_outside_slurm_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert limit.check_limit(config_of(tmp_path), None).text == "not inside a SLURM job: none"


def test_run_folder_is_left_as_it_was(tmp_path):
    assert disk.check_folder(str(tmp_path)).verdict in ("go", "note")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"runtime\.run_dir"):
        disk.check_folder(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("error", "dtype", "verdict"),
    [
        (1e-7, torch.float32, "go"),
        (1e-3, torch.float32, "no-go"),
        (1e-3, torch.bfloat16, "go"),
        (float("nan"), torch.bfloat16, "no-go"),
    ],
)
def test_attention_errors(error, dtype, verdict):
    assert parity.judge_error(error, dtype, ParallelPlan(), positions=9).verdict == verdict


@pytest.fixture
def data(tmp_path):
    """A data set of one sample with one image."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    entry = {
        "annotation": str(tmp_path / "a.jsonl"),
        "root": str(tmp_path),
        "repeat_time": 1,
        "data_augment": False,
    }
    (tmp_path / "meta.json").write_text(json.dumps({"one": entry}))
    return load_run_config(None, [f"data.meta={tmp_path}/meta.json"])


def test_images_of_the_first_samples_are_decoded(data):
    assert "1 data sets, 1 images" in inputs.check_data(data).text


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_data_that_cannot_be_read(data, tmp_path, damage):
    if damage == "missing":
        (tmp_path / "a.png").unlink()
    elif damage == "cut":
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    else:
        (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.(png|jsonl)"):
        inputs.check_data(data)
