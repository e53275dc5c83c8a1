"""Step folders: the newest one is found, an older one never silently; keep-N never deletes the last good one."""

import pytest

from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, write_info
from megatron_v2pe.checkpoint.resume import resume_point
from megatron_v2pe.checkpoint.retention import (
    checkpoints_path,
    complete_steps,
    prune,
    step_path,
    write_latest,
)
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.core.errors import CheckpointError, ConfigError


def make(run_dir, *steps, complete=True):
    for step in steps:
        path = step_path(run_dir, step)
        path.mkdir(parents=True)
        (path / "data").write_text("x")
        if complete:
            write_info(path, CheckpointInfo(kind="train", step=step, family="f", num_parameters=1))


def test_only_folders_with_checkpoint_json_are_complete(tmp_path):
    assert complete_steps(tmp_path) == []
    make(tmp_path, 10, 20)
    make(tmp_path, 30, complete=False)
    (checkpoints_path(tmp_path) / "step_00000040.incomplete").mkdir()
    (checkpoints_path(tmp_path) / "notes").mkdir()
    assert complete_steps(tmp_path) == [10, 20]


def test_a_crash_before_latest_was_written_loses_nothing(tmp_path):
    make(tmp_path, 10)
    write_latest(tmp_path, 10)
    make(tmp_path, 20)
    assert (checkpoints_path(tmp_path) / "latest").read_text() == "step_00000010\n"
    assert resume_point(tmp_path, fallback=False) == step_path(tmp_path, 20)


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


def damage(run_dir, step):
    (step_path(run_dir, step) / "data").write_text("")


def test_a_damaged_newest_does_not_count_as_kept_and_is_left_alone(tmp_path, caplog):
    make(tmp_path, 10, 20, 30, 40)
    damage(tmp_path, 40)
    assert prune(tmp_path, keep=1, written=40) == [step_path(tmp_path, 10), step_path(tmp_path, 20)]
    assert complete_steps(tmp_path) == [30, 40]
    assert "step_00000040: damaged checkpoint: data has 0 bytes instead of 1" in caplog.text


def test_resume_uses_the_newest_good_one(tmp_path):
    assert resume_point(tmp_path, fallback=False) is None
    make(tmp_path, 10, 20)
    write_latest(tmp_path, 10)  # a crash before it was moved on
    (checkpoints_path(tmp_path) / "step_00000030.incomplete").mkdir()
    assert resume_point(tmp_path, fallback=False) == step_path(tmp_path, 20)


def cut(run_dir):
    damage(run_dir, 30)
    return "step_00000030: damaged checkpoint: data has 0 bytes instead of 1"


def lose_a_file(run_dir):
    (step_path(run_dir, 30) / "data").unlink()
    return "step_00000030: damaged checkpoint: data is missing"


def lose_its_json(run_dir):
    (step_path(run_dir, 30) / "checkpoint.json").unlink()
    return "step_00000030: has no checkpoint.json"


def lose_it(run_dir):
    step_path(run_dir, 30).rename(run_dir / "gone")
    return "latest names step_00000030, which does not exist"


DAMAGES = [cut, lose_a_file, lose_its_json, lose_it]


@pytest.mark.parametrize("harm", DAMAGES)
def test_a_damaged_newest_stops_the_run_and_offers_the_one_before(tmp_path, harm):
    make(tmp_path, 10, 20, 30)
    write_latest(tmp_path, 30)
    message = harm(tmp_path)
    damage(tmp_path, 20)
    with pytest.raises(CheckpointError) as error:
        resume_point(tmp_path, fallback=False)
    assert message in str(error.value)
    assert "step_00000020: damaged" in str(error.value)
    assert f"the newest good checkpoint is {step_path(tmp_path, 10)}" in str(error.value)
    assert "checkpoint.fallback=true" in str(error.value)


@pytest.mark.parametrize("harm", DAMAGES)
def test_fallback_uses_the_one_before_and_logs_an_error(tmp_path, caplog, harm):
    make(tmp_path, 10, 20, 30)
    write_latest(tmp_path, 30)
    message = harm(tmp_path)
    assert resume_point(tmp_path, fallback=True) == step_path(tmp_path, 20)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert message in record.getMessage()
    assert "an OLDER checkpoint" in record.getMessage()


@pytest.mark.parametrize("harm", DAMAGES)
def test_without_a_good_one_nothing_is_started_from_scratch(tmp_path, harm):
    make(tmp_path, 30)
    write_latest(tmp_path, 30)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
        resume_point(tmp_path, fallback=True)


def test_keep_zero_is_refused(tmp_path):
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="at least 1"):
        prune(tmp_path, keep=0, written=10)


STATE = RunState(step=3, consumed_packs=12, data_seed=7, data_hash="a", schedule={"num_steps": 3})


def test_run_state_survives_json():
    assert RunState.from_json(STATE.to_json()) == STATE


def test_run_state_of_an_import_is_refused():
    with pytest.raises(CheckpointError, match="weights only"):
        RunState.from_json({})
    with pytest.raises(CheckpointError, match="differ in: extra"):
        RunState.from_json({**STATE.to_json(), "extra": 1})


def test_other_data_is_refused_and_the_same_accepted():
    STATE.require_same_data(RunState.from_json({**STATE.to_json(), "consumed_packs": 99}))
    with pytest.raises(ConfigError, match="another plan"):
        STATE.require_same_data(RunState.from_json({**STATE.to_json(), "data_hash": "b"}))


def test_a_hash_that_0_1_0_wrote_is_passed_over():
    assert RunState.from_json({**STATE.to_json(), "config_hash": "36abdd5dd6a6849c"}) == STATE
