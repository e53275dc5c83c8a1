"""Everything that is wrong with a folder, in one error."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import clipped

_MOST = 600  # characters of a problem, whatever names the folder holds


def raise_problems(what: str, problems: Sequence[str], *, shown: int = 20) -> None:
    """Raise one CheckpointError for a list of problems; nothing when it is empty."""
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise CheckpointError(
            "\n  ".join([f"{what}:", *(clipped(each, _MOST) for each in problems[:shown]), *more])
        )
