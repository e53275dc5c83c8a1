"""Worker processes: forked from a fresh server that has imported the heavy modules once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

_HEAVY = "megatron_v2pe.synthesis.run"


def worker_context() -> BaseContext:
    """How workers are started: never by forking this process, which may have threads of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_HEAVY])
    return context
