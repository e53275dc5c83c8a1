"""One process trains in a run folder at a time: a second one would write the same checkpoints and metrics.

    rank 0 --lock--> RUN_DIR/run.lock    held by another process: it is named, and the start is refused

It is a POSIX record lock: the system releases it with the process, however that ends, and no child inherits it. The
file stays, as removing it would let two processes hold locks of two files of one name. Of a machine that vanished a
network file system keeps locks for a minute or two, so a holder on another machine is waited for.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = "run.lock"
_WAIT_S = 5.0  # for a process that is just ending
_WAIT_FOR_OTHERS_S = 180.0
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(run_dir: Path, *, by_this_rank: bool = True) -> Iterator[None]:
    """Hold the lock of a run folder.

    Args:
        run_dir: the folder, which exists.
        by_this_rank: False does nothing; one rank of a run locks for all.

    Raises:
        ConfigError: another process holds it; the message names process and machine.
    """
    if not by_this_rank:
        yield
        return
    descriptor = os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, run_dir)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()} {time.strftime('%FT%T')}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    started, is_reported = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                logger.warning(
                    "%s cannot be locked (%s): a second process in it would not be noticed",
                    run_dir,
                    error.strerror,
                )
                return
        host, process, since = (
            *os.pread(descriptor, 1000, 0).decode(errors="replace").split(),
            "?",
            "?",
            "?",
        )[:3]
        is_here = host == socket.gethostname()
        if time.monotonic() - started > (_WAIT_S if is_here else _WAIT_FOR_OTHERS_S):
            raise _refusal(run_dir, f"process {process} on {host}, since {since}", is_final=is_here)
        if not is_reported:
            logger.warning("%s is in use by process %s on %s: waiting for it to end", run_dir, process, host)
            is_reported = True
        time.sleep(0.2)


def _refusal(run_dir: Path, holder: str, *, is_final: bool) -> ConfigError:
    error = ConfigError(
        f"runtime.run_dir is {str(run_dir)!r}, in which another process trains ({holder}); wait for it, end it "
        f"(touch {run_dir}/stop), or give this run its own folder"
    )
    error.is_final = is_final
    return error
