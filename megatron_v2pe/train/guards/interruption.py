"""Requests from outside, by a signal to any rank or a file in the run folder; all ranks follow after the same step.

    SIGTERM, SIGUSR1, SIGINT to a rank --+
    RUN_DIR/stop (looked for by rank 0) -+--> agreed over ranks after each step --> checkpoint --> interrupted.json
    SIGUSR2, RUN_DIR/profile_now --------+                                      --> `profiling` of the next steps

The file `stop` is for batch scripts: torchrun gives its ranks 30 seconds after a signal to itself, which is too short
for a large checkpoint, while a script that traps the signal and makes the file gives them all the time it has left.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import psutil
import torch.distributed as dist

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "stop"
PROFILE_FILE = "profile_now"
RECORD = "interrupted.json"
_BY_FILE = 1000  # the file, among signal numbers
_ECHO_SECONDS = 3.0  # torchrun repeats a Ctrl-C that the terminal has sent to its ranks already


class Interruption:
    """Watches for requests while it is entered; a second SIGINT, some seconds after the first, stops at once.

    Args:
        run_dir: folder of the run.
        ranks: this rank's place.

    Entering removes what an earlier interruption left in the folder; a file `stop` that is newer than this process
    is a request to it, which is met before the first step.
    """

    def __init__(self, run_dir: Path, *, ranks: Ranks) -> None:
        self._stop_file = run_dir / STOP_FILE
        self._record_path = run_dir / RECORD
        self._profile_file = run_dir / PROFILE_FILE
        self._ranks = ranks
        self._seen = 0
        self._seen_at = 0.0
        self._is_profile_asked = False
        self.is_profile_agreed = False
        self.is_save_agreed = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if self._ranks.rank == 0:
            if not self._is_stop_asked_now():
                self._stop_file.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._earlier[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, self._handle_profile)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _is_stop_asked_now(self) -> bool:
        try:
            return self._stop_file.stat().st_mtime >= psutil.Process().create_time()
        except FileNotFoundError:
            return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._seen == number and now - self._seen_at > _ECHO_SECONDS:
            raise KeyboardInterrupt
        self._seen = number
        self._seen_at = now

    def _handle_profile(self, number: int, frame: FrameType | None) -> None:
        self._is_profile_asked = True

    def agreed(self, *, wants_save: bool = False) -> str:
        """What asked any rank to stop, "" if nothing did. Collective, after every step; three numbers travel.

        `is_profile_agreed` says until the next call whether anybody asked any rank for a profile meanwhile, and
        `is_save_agreed` whether a checkpoint is due by the clock of any rank.

        Args:
            wants_save: it is by this rank's clock.
        """
        if self._ranks.rank == 0:
            if not self._seen and self._stop_file.exists():
                self._seen = _BY_FILE
            if self._profile_file.exists():
                self._is_profile_asked = True
                self._profile_file.unlink(missing_ok=True)
        is_asked, self._is_profile_asked = self._is_profile_asked, False
        own = np.array([self._seen, int(is_asked), int(wants_save)], dtype=np.int64)
        (asked,) = to_device([own], self._ranks.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number, profile, save = asked.tolist()
        self.is_profile_agreed, self.is_save_agreed = bool(profile), bool(save)
        return "" if not number else STOP_FILE if number == _BY_FILE else signal.Signals(number).name

    def record(self, reason: str, *, step: int) -> None:
        """Leave interrupted.json for whoever starts the run again; rank 0 writes it, after the checkpoint."""
        if self._ranks.rank == 0:
            self._stop_file.unlink(missing_ok=True)
            write_atomic(self._record_path, json.dumps({"reason": reason, "step": step}) + "\n")
        logger.warning("stopped by %s after step %d; the same command continues from there", reason, step)
