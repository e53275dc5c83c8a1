"""A run folder given where a checkpoint is wanted means its newest complete one."""

import pytest

from megatron_v2pe.checkpoint.retention import checkpoint_of
from megatron_v2pe.core.errors import CheckpointError


@pytest.fixture
def run_dir(tmp_path):
    for step, is_complete in ((10, True), (20, True), (30, False)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        if is_complete:
            (folder / "checkpoint.json").touch()
    return tmp_path


def test_the_newest_complete_one_is_meant(run_dir):
    newest = run_dir / "checkpoints" / "step_00000020"
    assert checkpoint_of(run_dir) == checkpoint_of(run_dir / "checkpoints") == newest
    assert checkpoint_of(newest) == newest


def test_anything_else_is_left_to_whoever_reads_it(run_dir, tmp_path):
    older = run_dir / "checkpoints" / "step_00000010"
    assert checkpoint_of(older) == older
    assert checkpoint_of(tmp_path / "none") == tmp_path / "none"


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        CheckpointError, match=r"run that has no complete checkpoint; see checkpoint\.save_every"
    ):
        checkpoint_of(tmp_path)
