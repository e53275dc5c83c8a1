"""Processes that end when nobody waits for them any more: loader workers, and ranks whose launcher is gone.

Worker processes are forked from a fresh server that has imported the heavy modules once, not
from the process that wants them: threads of gloo, CUDA or OpenMP would be inherited in a broken
state.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_LAUNCHERS = (b"torchrun", b"torch.distributed.run", b"torch.distributed.launch", b"ft_launcher")


def worker_context(preload: str) -> BaseContext:
    """How workers are started.

    Args:
        preload: name of a module; the server imports it once for all workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context


def start_worker_server(preload: str) -> None:
    """Start the server of `worker_context` now, so that it imports `preload` while this process does other things.

    It has the environment of this moment, and so have its workers.
    """
    worker_context(preload)
    forkserver.ensure_running()


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


def end_without_launcher() -> None:
    """Ask this rank to end, by SIGTERM, when the launcher that started it is gone.

    A killed torchrun leaves its ranks running, unattended and holding their run folder. While a rank trains, the signal
    is an interruption as any other: a checkpoint after the current step. A shell between the two is looked through.
    """
    links = _links_to_launcher()
    threading.Thread(target=_watch_links, args=(links,), name="launcher watch", daemon=True).start()


def _watch_links(links: dict[int, int]) -> None:
    while all(_parent_of(process) == parent for process, parent in links.items()):
        time.sleep(_POLL_SECONDS)
    logger.error("the launcher of this rank (process %d) is gone: this rank ends, too", [*links.values()][-1])
    os.kill(os.getpid(), signal.SIGTERM)


def _links_to_launcher() -> dict[int, int]:
    """Process -> its parent, from this process up to torchrun; this process and its parent where there is none."""
    links, process = {os.getpid(): os.getppid()}, os.getppid()
    found = dict(links)
    while process > 1 and not _is_launcher(process):
        parent = _parent_of(process)
        if parent is None:
            return links
        found[process] = parent
        process = parent
    return found if _is_launcher(process) else links


def _is_launcher(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in _LAUNCHERS)


def _parent_of(process: int) -> int | None:
    """Parent of a process; None where that cannot be known, as the process is gone."""
    if process == os.getpid():
        return os.getppid()
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])  # after the name: state, parent
