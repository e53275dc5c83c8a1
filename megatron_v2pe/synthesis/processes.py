"""Worker processes: forked from a fresh server that has imported the heavy modules once."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext

_HEAVY = "megatron_v2pe.synthesis.run"


def worker_context() -> BaseContext:
    """How workers are started: never by forking this process, which may have threads of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_HEAVY])
    return context


def end_with_parent() -> None:
    """End this worker when the process that started it is gone.

    A killed process cannot tell its workers, which would wait for work for ever.
    """
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
