"""checkpoint.verify full: ranks hash a share each, and all of them hear of a flipped bit in any share."""

import pytest

from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, write_info
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.core.errors import CheckpointError
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed


def make(run_dir, *steps):
    for step in steps:
        folder = step_path(run_dir, step)
        folder.mkdir(parents=True)
        for size in (5, 4, 3):
            (folder / f"file_{size}").write_bytes(b"x" * size)
        write_info(folder, CheckpointInfo(kind="train", step=step, family="f", num_parameters=1))


def outcomes(rank, world_size, run_dir):
    """What a rank gets: without and with fallback, and for each folder alone."""
    from megatron_v2pe.checkpoint.resume import resume_point_in_full, verify_in_full
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown

    ranks = init_distributed(ParallelPlan(dp=world_size), seed=1, timeout_minutes=1).ranks

    def attempt(act):
        try:
            return str(act())
        except CheckpointError as error:
            return f"refused: {error}"

    found = [
        attempt(lambda: resume_point_in_full(run_dir, fallback=False, ranks=ranks)),
        attempt(lambda: resume_point_in_full(run_dir, fallback=True, ranks=ranks)),
        *(
            attempt(lambda step=step: verify_in_full(step_path(run_dir, step), ranks=ranks))
            for step in (1, 2, 3)
        ),
    ]
    shutdown()
    return found


def test_all_ranks_agree_wherever_the_damage_is(tmp_path):
    """Sorted by size, rank 0 hashes file_5 and file_3, rank 1 file_4: each reports what the other found."""
    make(tmp_path, 1, 2, 3)
    (step_path(tmp_path, 3) / "file_4").write_bytes(b"xxyx")
    (step_path(tmp_path, 2) / "file_3").write_bytes(b"xyx")
    first, second = run_ranks(outcomes, 2, str(tmp_path), timeout=90)
    assert first == second
    stopped, fallen_back, one, two, three = first
    assert "refused: " in stopped
    assert "file_4 has the right size but other contents" in stopped
    assert "file_3 has the right size but other contents" in stopped
    assert f"the newest good checkpoint is {step_path(tmp_path, 1)}" in stopped
    assert fallen_back == str(step_path(tmp_path, 1))
    assert one == "None"
    assert "step_00000002: damaged checkpoint: file_3" in two
    assert "step_00000003: damaged checkpoint: file_4" in three
