"""Which errors another start of the same command can mend: those of a run that made progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_v2pe.core.errors import CheckpointError, DataError


@contextmanager
def final_without_progress(step: Callable[[], int]) -> Iterator[None]:
    """Data and checkpoint errors are final where no step was done since this was entered.

    A file that could be read for some steps, or a loader process that had memory, may be there after a restart.

    Args:
        step: the number of updates done so far.
    """
    first = step()
    try:
        yield
    except (DataError, CheckpointError) as error:
        error.is_final = step() == first
        raise
