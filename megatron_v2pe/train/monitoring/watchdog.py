"""A rank that makes no progress reports where it hangs and ends, so that the launcher can start all of them again.

    step done --beat--> time of the last step  <--every second-- thread --too long ago--> stacks/rank_N.txt and .jsonl,
                                                     |                                    stacks/nccl_rank_N, exit 1
                                                     |--every 10 s--> heartbeats/rank_N.json

The .jsonl has one line for each hang: which step, and in which call of the training thread. `megatron-v2pe runs` puts
those of all ranks together; a rank without a line was stopped, or its machine is gone.

The thread lives beside a main thread that hangs in a collective, which no exception can reach: the process is ended
outright. Should a call that hangs hold Python's lock, the thread cannot run either; then faulthandler's own timer,
which the thread keeps pushing back, writes the stacks and ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.train.monitoring.stack_location import locate_stall

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0
_GRACE_SECONDS = 3.0  # for ranks that hang with this one to write their stacks before the launcher ends them
_TIMER_GRACE_SECONDS = 10.0
_SILENT_SECONDS = 1.5 * _HEARTBEAT_SECONDS
_READERS = 8  # first ranks, which read all heartbeats at a hang; all ranks would be too many for a disk
EXIT_CODE = 1  # as of any failure that is not the user's: torchrun starts the ranks again


def collective_timeout_minutes(hang_timeout_s: float) -> int:
    """How long a collective may wait: as long as a step; a day where nothing is watched.

    Never below 30 minutes, as ranks also wait in start-up, while one of them measures data.
    """
    if not hang_timeout_s:
        return 24 * 60
    return max(30, math.ceil(hang_timeout_s / 60))


class Watchdog:
    """Watches this rank while it is entered.

    Args:
        run_dir: `stacks/` and `heartbeats/` are made in it.
        rank: global rank.
        world_size: ranks of the run, which the report of a hang counts.
        timeout_s: seconds without a beat that end the process; 0 only writes heartbeats.
        first_step: step that is under way when it is entered.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, timeout_s: float, first_step: int
    ) -> None:
        self._stacks = run_dir / "stacks" / f"rank_{rank}.txt"
        self._heartbeat = run_dir / "heartbeats" / f"rank_{rank}.json"
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout_s
        self._step = first_step
        self._beaten_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: TextIO

    def __enter__(self) -> Watchdog:
        for path in (self._stacks, self._heartbeat):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Appended to: after a restart the stacks of the hang before are what a person looks for.
        self._file = open(self._stacks, "a", encoding="utf-8")
        self._beaten_at = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._stacks.stat().st_size:
            self._stacks.unlink()

    def beat(self, step: int) -> None:
        """Step `step` is under way now; two assignments."""
        self._step = step
        self._beaten_at = time.monotonic()

    def _watch(self) -> None:
        check_s = min(_CHECK_SECONDS, self._timeout / 4) if self._timeout else _CHECK_SECONDS
        written_at = -_HEARTBEAT_SECONDS
        while True:
            waited = time.monotonic() - self._beaten_at
            if self._timeout and waited > self._timeout:
                self._end(waited)
            if self._timeout:
                left = self._timeout - waited + _TIMER_GRACE_SECONDS
                faulthandler.dump_traceback_later(left, exit=True, file=self._file)
            if time.monotonic() - written_at >= _HEARTBEAT_SECONDS:
                self._write_heartbeat(waited)
                written_at = time.monotonic()
            if self._stop.wait(check_s):
                return

    def _write_heartbeat(self, waited: float) -> None:
        line = {
            "step": self._step,
            "seconds_in_step": round(waited, 1),
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            write_atomic(self._heartbeat, json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not blind the watch
            logger.warning("%s cannot be written (%s)", self._heartbeat, error.strerror)

    def _end(self, waited: float) -> None:
        """Write where every thread is, and end the process."""
        try:
            location, silent = locate_stall(), self._silent()
            text = (
                f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: step {self._step} is not done "
                f"after {waited:.1f} s (runtime.hang_timeout_s = {self._timeout:g}); it {location}; "
                f"{_described(silent)}{time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
            logger.error("%s; stacks of its threads are in %s; this process ends now", text, self._stacks)
            self._file.write(text + "\n\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.write("\n")
            self._file.flush()
            line = {
                "rank": self._rank,
                "world_size": self._world_size,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": self._step,
                "seconds": round(waited, 1),
                "time": time.time(),
                **asdict(location),
                "silent": silent,
            }
            append_json(self._stacks.with_suffix(".jsonl"), line)
            write_collectives(self._stacks.with_name(f"nccl_rank_{self._rank}"))
        finally:
            time.sleep(_GRACE_SECONDS)
            os._exit(EXIT_CODE)

    def _silent(self) -> list[dict[str, Any]]:
        """Heartbeats of ranks that have stopped writing any; a rank that merely waits continues to write them."""
        if self._rank >= _READERS:
            return []
        found = []
        for rank in range(self._world_size):
            path = self._heartbeat.with_name(f"rank_{rank}.json")
            try:
                line = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:  # it never came to its first step; `runs` sees that it wrote nothing
                continue
            age = time.time() - line["time"]
            if rank != self._rank and age > _SILENT_SECONDS:
                found.append(
                    {"rank": rank, "host": line["host"], "step": line["step"], "seconds": round(age, 1)}
                )
        return found


def write_collectives(path: Path) -> bool:
    """Write the last collectives of this rank's NCCL groups, which of them began and ended; False without NCCL.

    NCCL itself writes the same file when a collective times out, but this process ends before: a step begins before the
    collective in which it hangs, and both clocks are as long. `torchfrtrace` compares the files of all ranks.
    """
    if not (torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return False
    dump = torch._C._distributed_c10d._dump_nccl_trace  # type: ignore[attr-defined]  # builds with NCCL have it
    write_atomic(path, dump(True, True, False))
    return True


def _described(silent: Sequence[Mapping[str, Any]]) -> str:
    """Silent ranks as text, a few of them."""
    each = [
        f"rank {line['rank']} on {line['host']} (step {line['step']}, {line['seconds']:.0f} s ago)"
        for line in silent
    ]
    more = f" and {len(each) - 4} more" if len(each) > 4 else ""
    return f"last heartbeat of {', '.join(each[:4])}{more}; " if each else ""
