"""Worker processes: forked from a fresh server that has imported the heavy modules once, and gone when their parent is.

They are not forked from the process that wants them: threads of gloo, CUDA or OpenMP would be inherited in a broken
state.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext


def worker_context(preload: str) -> BaseContext:
    """How workers are started.

    Args:
        preload: name of a module; the server imports it once for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def end_with_parent() -> None:
    """End this worker when the process that started it is gone.

    A killed process cannot end its workers, which would wait for work for ever.
    """
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
