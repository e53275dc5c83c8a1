"""A refused launch: remembered for its own restarts, for no other launch, and by nobody without torchrun."""

from megatron_v2pe.core.refusal import refuse, was_refused


def environment(folder, *, attempt, local_rank=0):
    return {"TORCHELASTIC_ERROR_FILE": str(folder / f"attempt_{attempt}" / str(local_rank) / "error.json")}


def test_the_next_start_of_the_launch_is_refused(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert not was_refused(environment(first, attempt=0))
    assert refuse("optim.lr is 0", environment(first, attempt=0, local_rank=3))
    assert not refuse("optim.lr is 0", environment(first, attempt=0))  # reported already
    assert refuse("parallel.cp is 3", environment(first, attempt=0))
    assert was_refused(environment(first, attempt=1))
    assert not was_refused(environment(second, attempt=0))


def test_without_torchrun_nothing_is_remembered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for values in ({}, {"TORCHELASTIC_ERROR_FILE": "/dev/null"}):
        assert refuse("optim.lr is 0", values)
        assert not was_refused(values)
    assert not list(tmp_path.iterdir())
