"""Everything that is wrong with a folder, in one error."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.core.errors import CheckpointError


def raise_problems(what: str, problems: Sequence[str], *, shown: int = 20) -> None:
    """Raise one CheckpointError for a list of problems; nothing when it is empty."""
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise CheckpointError("\n  ".join([f"{what}:", *problems[:shown], *more]))
