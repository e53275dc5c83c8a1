"""When a run saves and what it waits for: the order of calls, with a save that only says what is asked of it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group
from megatron_v2pe.config.schema import CheckpointConfig, OptimConfig, RunConfig
from megatron_v2pe.core.errors import CheckpointError, TrainingError
from megatron_v2pe.train import saving
from megatron_v2pe.train.saving import Saver
from tests.support.tiny import GOLDEN_HF

RANKS = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


class FakeSave:
    """One save; `gate` holds its writing up."""

    made: ClassVar[list["FakeSave"]]
    gate: ClassVar[threading.Event]
    write_fails: ClassVar[bool]

    def __init__(self, run_dir, *, run_state, known, **rest):
        self.run_state, self.calls, self.num_bytes, self.known = run_state, [], 100, "plan"
        self.given, self.has_failed = known, False
        FakeSave.made.append(self)

    def copy_state(self, memory):
        self.calls.append("copy")

    def write(self, *, cancelled=None):
        if cancelled is not None:
            while not FakeSave.gate.wait(0.01) and not cancelled.is_set():
                pass
        self.has_failed = FakeSave.write_fails or (cancelled is not None and cancelled.is_set())
        self.calls.append("write")

    def join(self):
        self.calls.append("join")
        if self.has_failed:
            raise CheckpointError("cannot be written")

    def commit(self):
        self.calls.append("commit")

    def finish(self):
        self.calls.append("finish")
        return Path(f"step_{self.run_state.step}")


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(saving, "CheckpointSave", FakeSave)
    monkeypatch.setattr(saving, "make_moments", lambda optimizer: None)
    FakeSave.made, FakeSave.gate, FakeSave.write_fails = [], threading.Event(), False
    trainer = SimpleNamespace(
        wrapped=[],
        optimizer=None,
        scheduler=SimpleNamespace(state_dict=dict),
        expert_bias=SimpleNamespace(table=dict),
    )

    def saver(*, async_save=True, **settings):
        checkpoint = CheckpointConfig(async_save=async_save, **{"save_every": 2, **settings})
        config = RunConfig(checkpoint=checkpoint, optim=OptimConfig(steps=9))
        return Saver(config, trainer, ranks=RANKS, hf_folder=GOLDEN_HF)

    with ensure_process_group():
        yield saver


def step(saver, number, *, is_interrupted=False, is_applied=True, is_time=False):
    state = RunState(step=number, consumed_packs=0, data_seed=0, data_hash="")
    saver.after_step(state, is_interrupted=is_interrupted, is_applied=is_applied, is_time=is_time)


def let_threads_end():
    FakeSave.gate.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_parts_go_on_between_steps_and_the_next_save_knows_the_plan(make):
    saver = make()
    for number in (1, 2, 3):
        step(saver, number)
    (first,) = FakeSave.made
    assert first.calls == ["copy"]  # writing, held up by the gate
    let_threads_end()
    step(saver, 3)
    let_threads_end()
    assert first.calls == ["copy", "write", "join", "commit"]
    step(saver, 3)
    assert first.calls[-1] == "finish"
    step(saver, 4)
    assert [save.given for save in FakeSave.made] == [None, "plan"]
    assert saver.take_pause() > 0
    assert saver.take_pause() == 0


def test_a_save_that_comes_too_soon_waits_for_the_one_before(make, caplog):
    saver = make()
    step(saver, 2)
    threading.Timer(0.1, FakeSave.gate.set).start()
    step(saver, 4)
    assert FakeSave.made[0].calls == ["copy", "write", "join", "commit", "finish"]
    assert "step 4 is to be saved, but the checkpoint of step 2 is still being written" in caplog.text


@pytest.mark.parametrize(("number", "is_interrupted"), [(9, False), (3, True)])
def test_the_last_step_and_an_interruption_are_written_before_anything_else(make, number, is_interrupted):
    saver = make()
    step(saver, number, is_interrupted=is_interrupted)
    assert FakeSave.made[0].calls == ["write", "join", "commit", "finish"]


def test_a_save_after_a_step_that_was_not_applied_comes_after_the_next_that_is(make):
    saver = make(async_save=False)
    step(saver, 2, is_applied=False)
    step(saver, 3, is_applied=False)
    assert FakeSave.made == []
    for number in (4, 5):
        step(saver, number, is_applied=number == 5)
    step(saver, 6)
    assert [save.run_state.step for save in FakeSave.made] == [5, 6]


def test_a_run_that_ends_after_a_step_that_was_not_applied_is_saved(make):
    saver = make()
    step(saver, 3, is_interrupted=True, is_applied=False)
    assert [save.run_state.step for save in FakeSave.made] == [3]


def test_without_async_save_every_step_waits(make):
    saver = make(async_save=False)
    step(saver, 2)
    assert FakeSave.made[0].calls == ["write", "join", "commit", "finish"]


def test_without_save_every_a_save_is_due_by_time(make, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    saver = make(save_every=0, async_save=False)
    assert not saver.is_time
    now += 30 * 60
    assert saver.is_time
    step(saver, 3, is_time=True)
    assert [save.run_state.step for save in FakeSave.made] == [3]
    assert not saver.is_time
    now += 30 * 60
    step(saver, 4, is_time=True, is_applied=False)
    assert len(FakeSave.made) == 1
    step(saver, 5)
    assert [save.run_state.step for save in FakeSave.made] == [3, 5]


@pytest.mark.parametrize("settings", [{"save_every": 3}, {"save_every": 0, "save_minutes": 0}])
def test_no_save_is_due_by_time(make, monkeypatch, settings):
    now = 0.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    saver = make(**settings)
    now = 1e9
    assert not saver.is_time


def test_only_the_last_step_is_saved_when_save_every_is_0(make):
    saver = make(save_every=0)
    for number in (1, 8):
        step(saver, number)
    assert FakeSave.made == []
    step(saver, 9)
    assert len(FakeSave.made) == 1


def test_a_failed_write_is_raised_between_steps(make):
    saver = make()
    FakeSave.write_fails = True
    step(saver, 2)
    let_threads_end()
    with pytest.raises(CheckpointError, match="cannot be written"):
        step(saver, 3)


def end_by(error, saver):
    """A run whose third step raises."""
    with saver:
        step(saver, 2)
        raise error


def test_an_error_of_all_ranks_ends_the_save_and_is_what_comes_out(make):
    FakeSave.gate.set()
    with pytest.raises(TrainingError):
        end_by(TrainingError("bad steps"), make())
    assert FakeSave.made[0].calls[-1] == "finish"


def test_an_error_of_one_rank_gives_the_save_up_without_another_collective(make, caplog):
    with pytest.raises(ValueError, match="mine"):
        end_by(ValueError("mine"), make())
    assert FakeSave.made[0].calls == ["copy", "write"]
    assert "the checkpoint of step 2 was still being written and is lost" in caplog.text
