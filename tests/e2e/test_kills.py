"""Killed runs, started again, end with the losses of an undisturbed one; tools/kill_runs.py does it 100 times."""

import pytest

from tests.support.kills import kill_runs


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(1, 6), (2, 3)])
def test_killed_runs_lose_nothing(tmp_path, ranks, count):
    report = kill_runs(tmp_path, count=count, seed=0, ranks=ranks)
    assert report.failures == []
    assert report.kills == count
    assert report.in_start_up < count
