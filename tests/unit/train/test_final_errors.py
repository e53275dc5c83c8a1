"""Which errors of a run a restart can mend: those behind a step that was done."""

from types import SimpleNamespace

import pytest

from megatron_v2pe.core.errors import CheckpointError, DataError, TrainingError
from megatron_v2pe.train.loop import final_without_progress


@pytest.mark.parametrize(
    ("error", "steps_done", "is_final"),
    [
        (DataError, 0, True),  # what could not be read at the start will not be readable the next time
        (DataError, 1, False),
        (CheckpointError, 1, False),  # a disk that was full
        (TrainingError, 5, True),  # the same packs and weights give the same numbers
    ],
)
def test_errors_behind_a_step_are_worth_another_start(error, steps_done, is_final):
    run = SimpleNamespace(state=SimpleNamespace(step=7))

    def fail():
        with final_without_progress(run):
            run.state.step += steps_done
            raise error("x")

    with pytest.raises(error) as raised:
        fail()
    assert raised.value.is_final is is_final
