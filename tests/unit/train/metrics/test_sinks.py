"""Sinks: what is asked for is opened, what is missing is named, numbers that are not finite leave gaps."""

import importlib.util
import json
import sys
import types

import pytest

from megatron_v2pe.config.schema import RuntimeConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.train.metrics.sinks import check_sinks, open_sinks

LINE = {"step": 3, "loss": None, "lr": 1e-4, "data_digest": "ab", "is_applied": False}
SOURCES = {"loss_by_source": {"books": 2.5, "web pages": None}, "tokens_by_source": {"books": 7}}


class FakeRun:
    """Remembers what a W&B run is given."""

    def __init__(self):
        self.logged, self.is_finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    run, settings = FakeRun(), {}
    module = types.ModuleType("wandb")
    module.init = lambda **given: settings.update(given) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run, settings


def test_missing_wandb_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"runtime\.wandb_project is 'long'.*megatron-v2pe\[track\]"):
        check_sinks(RuntimeConfig(wandb_project="long"))
    check_sinks(RuntimeConfig())


def test_wandb_gets_the_finite_numbers_and_is_continued_by_name(tmp_path, fake_wandb):
    run, settings = fake_wandb
    runtime = RuntimeConfig(wandb_project="long", tensorboard=False)
    sinks = open_sinks(runtime, tmp_path / "run_7", rank=0, first_step=1)
    sinks[1].write({**LINE, **SOURCES})
    sinks[1].close()
    numbers = {"train/lr": 1e-4, "train/is_applied": False, "train/loss/books": 2.5, "train/tokens/books": 7}
    assert run.logged == [(3, numbers)]
    assert run.is_finished
    assert (settings["project"], settings["id"], settings["resume"]) == ("long", "run_7", "allow")


def test_tensorboard_has_a_curve_for_each_number_and_each_data_set(tmp_path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    sink = open_sinks(RuntimeConfig(), tmp_path, rank=0, first_step=1)[1]
    sink.write({**LINE, **SOURCES})
    sink.write({**LINE, "step": 4, "loss_by_source": {"books": 2.25}})
    sink.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {"train/lr", "train/loss/books", "train/tokens/books"} <= set(found.Tags()["scalars"])
    assert "train/loss/web pages" not in found.Tags()["scalars"]
    points = [(point.step, point.value) for point in found.Scalars("train/loss/books")]
    assert points == [(3, 2.5), (4, 2.25)]


def test_lines_that_come_again_are_dropped(tmp_path):
    runtime = RuntimeConfig(tensorboard=False)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    (sink,) = open_sinks(runtime, tmp_path, rank=0, first_step=3)
    sink.write(LINE)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [{"step": 1}, {"step": 2}, LINE]


def test_only_rank_0_has_sinks(tmp_path):
    assert open_sinks(RuntimeConfig(wandb_project="x"), tmp_path, rank=1, first_step=1) == []


def test_a_line_that_a_crash_cut_does_not_keep_a_run_from_continuing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    (sink,) = open_sinks(RuntimeConfig(tensorboard=False), tmp_path, rank=0, first_step=2)
    sink.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_of_steps_that_come_again_are_kept_beside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 * step}) + "\n" for step in (1, 2, 3)))
    (sink,) = open_sinks(RuntimeConfig(tensorboard=False), tmp_path, rank=0, first_step=2)
    sink.write({"step": 2, "loss": 9.0})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 9.0]
    (sink,) = open_sinks(RuntimeConfig(tensorboard=False), tmp_path, rank=0, first_step=1)
    replaced = (tmp_path / "metrics_replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in replaced] == [2.0, 3.0, 1.0, 9.0]
