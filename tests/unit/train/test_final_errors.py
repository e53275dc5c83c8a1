"""Which errors of a run a restart can mend: those after a step that was done."""

from itertools import chain, repeat

import pytest

from megatron_v2pe.core.errors import CheckpointError, DataError, TrainingError
from megatron_v2pe.train.guards.final_errors import final_without_progress


@pytest.mark.parametrize(
    ("error", "steps_done", "is_final"),
    [
        (DataError, 0, True),  # what could not be read at the start will not be readable the next time
        (DataError, 1, False),
        (CheckpointError, 1, False),  # a disk that was full
        (TrainingError, 5, True),  # the same packs and weights give the same numbers
    ],
)
def test_errors_after_a_step_are_worth_another_start(error, steps_done, is_final):
    counts = chain([7], repeat(7 + steps_done))

    def fail():
        with final_without_progress(lambda: next(counts)):
            raise error("x")

    with pytest.raises(error) as raised:
        fail()
    assert raised.value.is_final is is_final
