"""Counting bytes for a verb that runs alone, or on the ranks that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_v2pe.cli.conversion import refuse_ranks
from megatron_v2pe.core.env import launcher

if TYPE_CHECKING:
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress


@contextmanager
def byte_progress(verb: str) -> Iterator[ByteProgress]:
    """Count bytes for a verb that runs in one process.

    Raises:
        ConfigError: torchrun started several.
    """
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress

    refuse_ranks(verb)
    progress = ByteProgress(verb)
    try:
        yield progress
    finally:
        progress.close()


@contextmanager
def shared_progress(verb: str) -> Iterator[ByteProgress]:
    """Join the other ranks where torchrun started several, and count this one's bytes."""
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress
    from megatron_v2pe.checkpoint.state.ranks import launched_ranks

    with launched_ranks():
        progress = ByteProgress(verb, rank=launcher().rank)
        try:
            yield progress
        finally:
            progress.close()
