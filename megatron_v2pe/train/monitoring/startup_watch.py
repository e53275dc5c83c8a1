"""A start that makes no progress ends with a report: imports, the other ranks' arrival, groups, model, weights.

    verb begins --> imports --> checks --> all ranks are there, started alike, in their groups --> model --> weights
                    each at most runtime.hang_timeout_s                                            at least 30 minutes

A rank that is stopped, or was never started, cannot report itself: those that wait for it do, and end. The data have
no limit, as one rank may measure them for hours; from the first batch on the watchdog of the steps has the watch.
Nothing heavy is imported here: the watch begins before torch is imported.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.5
_TIMER_GRACE_SECONDS = 10.0
_LOADING_S = 1800.0  # model and weights of any size; as long as collectives wait at least
_MET, _LOADED = "process groups", "checkpoint"  # after the second, the data are measured
EXIT_CODE = 1


class StartupWatch:
    """Watches the start of a run while it is entered, or until `stop`.

    Args:
        timeout_s: seconds that a phase may take; 0 watches nothing.
        rank: of this process, for the report.
    """

    def __init__(self, timeout_s: float, *, rank: int) -> None:
        self._timeout = timeout_s
        self._rank = rank
        self._limit = timeout_s
        self._after = "the process was started"
        self._beaten_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="start-up watch", daemon=True)

    def __enter__(self) -> StartupWatch:
        self._beaten_at = time.monotonic()
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def done(self, phase: str) -> None:
        """A phase of the start ended here; the limit of the next ones may change with it."""
        if phase == _MET:
            self._limit = max(self._timeout, _LOADING_S)
        elif phase == _LOADED:
            self._limit = 0.0
        self._after, self._beaten_at = f"'{phase}' was done", time.monotonic()

    def stop(self) -> None:
        """The start is over."""
        if not self._stop.is_set():
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        check_s = min(_CHECK_SECONDS, self._timeout / 4)
        while not self._stop.wait(check_s):
            limit, waited = self._limit, time.monotonic() - self._beaten_at
            if not limit:
                faulthandler.cancel_dump_traceback_later()
            elif waited > limit:
                self._end(waited, limit)
            else:  # ends the process should a call that hangs hold Python's lock
                faulthandler.dump_traceback_later(limit - waited + _TIMER_GRACE_SECONDS, exit=True)

    def _end(self, waited: float, limit: float) -> None:
        try:
            logger.error(
                "rank %d on %s, process %d: start-up makes no progress: %.1f s since %s (limit %g s, "
                "runtime.hang_timeout_s = %g); usually another rank was stopped, never started, or looks for rank 0 at "
                "another MASTER_ADDR or MASTER_PORT; where this one is follows; it ends now",
                self._rank,
                socket.gethostname(),
                os.getpid(),
                waited,
                self._after,
                limit,
                self._timeout,
            )
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        finally:
            os._exit(EXIT_CODE)
