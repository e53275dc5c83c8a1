"""What an import and an export of several ranks have in common: one folder, one warning about NaN and Inf."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_v2pe.checkpoint.files.staging import begin, commit
from megatron_v2pe.checkpoint.hf.converted_blocks import Dtype, not_finite_message
from megatron_v2pe.checkpoint.state.ranks import gather_from_ranks, on_first_rank, rank_and_world_size
from megatron_v2pe.core.errors import CheckpointError

logger = logging.getLogger(__name__)


@contextmanager
def staged_by_ranks(target: str | Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """`staging.staged` for several ranks: rank 0 makes the folder and renames it, or deletes it. Collective."""
    target = Path(target)
    tmp = on_first_rank(lambda: begin(target, force=force, needed_bytes=needed_bytes))
    is_first = rank_and_world_size()[0] == 0
    try:
        yield tmp
        on_first_rank(lambda: commit(tmp, target))
    except BaseException as error:
        if is_first:
            shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise


def warn_of_not_finite(not_finite: Counter[str], dtype: Dtype) -> None:
    """One warning for what all ranks found; float16 ends at 65504, so a cast to it may be the cause. Collective."""
    message = not_finite_message(sum(gather_from_ranks(not_finite), Counter()))
    if message and rank_and_world_size()[0] == 0:
        logger.warning("%s%s", message, " (after the cast to float16)" if dtype == "float16" else "")
