"""Starting a run again with other data or another model: explained, and continued only where that is asked for.

Strategy: a run of two steps, then the command of a third and fourth with one thing changed, as a user would give it.
"""

import json

import pytest

from tests.support import tiny
from tests.support.warm import run_verb


@pytest.fixture
def config(tmp_path):
    """A run that stopped after its second step."""
    path = tiny.run_yaml(
        tmp_path / "run.yaml",
        checkpoint=tiny.import_golden(tmp_path / "checkpoint"),
        meta=tiny.make_data(tmp_path / "data"),
        run_dir=tmp_path / "run",
    )
    done = run_verb("train", path, "optim.steps=2", "optim.warmup_steps=1")
    assert done.returncode == 0, done.stderr
    return path


def again(config, *overrides):
    done = run_verb("train", config, "optim.steps=4", "optim.warmup_steps=1", *overrides)
    return done.returncode, done.stderr


def test_other_data_and_another_model_need_a_flag_each(config, tmp_path):
    annotation = tmp_path / "data" / "train.jsonl"
    annotation.write_text("".join(annotation.read_text().splitlines(keepends=True)[:-2]))
    changed = ["model.freeze_projector=true"]
    code, log = again(config, *changed)
    assert code == 2
    assert "model.freeze_projector: False -> True" in log
    assert "checkpoint.allow_changed_model=true" in log
    assert (
        "freeze_projector: false" in (tmp_path / "run" / "config.yaml").read_text()
    )  # not of the refused one
    assert "Traceback" not in log
    code, log = again(config)
    assert code == 2
    assert "data set tiny: content: " in log
    assert "checkpoint.allow_changed_data=true to continue with step 3" in log
    assert "Traceback" not in log
    code, log = again(config, "checkpoint.allow_changed_data=true")
    assert code == 0, log
    assert "continuing with step 3 of the new plan" in log
    assert "changed since the last start: optim.steps: 2 -> 4" in log
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]
    code, log = again(config, "checkpoint.allow_changed_data=true")
    assert code == 0, log
    assert "optim.steps is 4: nothing is left to train" in log
