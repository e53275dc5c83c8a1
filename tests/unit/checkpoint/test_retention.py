"""Step folders: the newest complete one is found, keep-N never deletes it."""

import pytest

from megatron_v2pe.checkpoint.retention import (
    checkpoints_path,
    complete_steps,
    newest_checkpoint,
    prune,
    step_path,
    write_latest,
)
from megatron_v2pe.checkpoint.run_state import RunState, settings_hash
from megatron_v2pe.core.errors import CheckpointError, ConfigError


def make(run_dir, *steps, complete=True):
    for step in steps:
        path = step_path(run_dir, step)
        path.mkdir(parents=True)
        (path / "data").write_text("x")
        if complete:
            (path / "checkpoint.json").write_text("{}")


def test_newest_is_the_newest_complete_one(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    make(tmp_path, 10, 20)
    make(tmp_path, 30, complete=False)
    (checkpoints_path(tmp_path) / "step_00000040.incomplete").mkdir()
    (checkpoints_path(tmp_path) / "notes").mkdir()
    assert newest_checkpoint(tmp_path) == checkpoints_path(tmp_path) / "step_00000020"


def test_a_crash_before_latest_was_written_loses_nothing(tmp_path):
    make(tmp_path, 10)
    write_latest(tmp_path, 10)
    make(tmp_path, 20)
    assert (checkpoints_path(tmp_path) / "latest").read_text() == "step_00000010\n"
    assert newest_checkpoint(tmp_path) == step_path(tmp_path, 20)


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (5, [10, 20, 30])])
def test_keep_newest(tmp_path, keep, left):
    make(tmp_path, 10, 20, 30)
    prune(tmp_path, keep=keep, written=30)
    assert complete_steps(tmp_path) == left


def test_incomplete_folders_do_not_count_and_leftovers_go(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 30, complete=False)
    (checkpoints_path(tmp_path) / "step_00000020.incomplete").mkdir()
    prune(tmp_path, keep=1, written=10)
    assert complete_steps(tmp_path) == [10]
    assert sorted(p.name for p in checkpoints_path(tmp_path).iterdir()) == ["step_00000010", "step_00000030"]


def test_what_was_just_written_stays_below_later_steps(tmp_path):
    make(tmp_path, 10, 50, 60)
    prune(tmp_path, keep=2, written=10)
    assert complete_steps(tmp_path) == [10, 50, 60]


def test_keep_zero_is_refused(tmp_path):
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, keep=0, written=10)


STATE = RunState(
    step=3, consumed_packs=12, data_seed=7, data_hash="a", config_hash="c", schedule={"num_steps": 3}
)


def test_run_state_survives_json():
    assert RunState.from_json(STATE.to_json()) == STATE


def test_run_state_of_an_import_is_refused():
    with pytest.raises(CheckpointError, match="weights only"):
        RunState.from_json({})
    with pytest.raises(CheckpointError, match="differ in: extra"):
        RunState.from_json({**STATE.to_json(), "extra": 1})


def test_other_data_is_refused_and_the_same_accepted():
    STATE.require_same_data(RunState.from_json({**STATE.to_json(), "config_hash": "other"}))
    with pytest.raises(ConfigError, match="another plan"):
        STATE.require_same_data(RunState.from_json({**STATE.to_json(), "data_hash": "b"}))


def test_settings_hash_ignores_order_and_sees_values():
    assert (
        settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1}) != settings_hash({"a": 1, "b": 3})
    )
