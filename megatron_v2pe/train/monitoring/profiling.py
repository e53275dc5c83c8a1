"""Traces of a few steps by torch's profiler, for whoever asks why a step takes so long; off, it costs next to nothing.

    runtime.profile_from_step --------------------+
    RUN_DIR/profile_now, or SIGUSR2 to any rank --+--> the next runtime.profile_steps, on runtime.profile_ranks:
        (agreed over ranks, see `interruption`)            profile/rank_R_step_S.json.gz    for Perfetto
                                                           profile/rank_R_step_S.txt        what took longest

A trace covers a step with its wait for data, and its checkpoint where it has one. Taking it makes the step slower, by
how much depends on the number of operators; the other ranks wait.
"""

from __future__ import annotations

import functools
import gzip
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_v2pe.config.schema import RuntimeConfig
from megatron_v2pe.core.files import free_space, sync_folder, write_atomic

logger = logging.getLogger(__name__)

FOLDER = "profile"
_ROWS = 20
_WAIT = "wait for other ranks"
_COMMUNICATION = ("nccl", "c10d::", _WAIT)  # kernels on a device; on the host what starts and what waits


class StepProfiler:
    """Profiles steps while it is entered.

    Args:
        run_dir: `profile/` is made in it.
        rank: global rank.
        runtime: which steps, which ranks.
        first_step: step that is under way when it is entered.
        last_step: of the run.
        is_asked: whether somebody has asked for a profile during the step that is done; equal on all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        runtime: RuntimeConfig,
        first_step: int,
        last_step: int,
        is_asked: Callable[[], bool],
    ) -> None:
        self._folder = run_dir / FOLDER
        self._rank = rank
        self._steps = runtime.profile_steps
        self._is_asked = is_asked
        self._first_step = first_step
        self._last_step = last_step
        chosen = runtime.profile_ranks
        self._is_chosen = chosen == "all" or rank in map(int, chosen.split(","))
        begin = runtime.profile_from_step
        self._window = range(begin, begin + self._steps) if begin else range(0)
        self._profile: Any = None
        self._plain_wait: Any = None
        self._started_at = 0.0

    def __enter__(self) -> StepProfiler:
        self._start_if_due(self._first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:  # of a step that did not end
            self._stop()

    def beat(self, step: int) -> None:
        """Step `step` is under way now: write the trace of the one before, begin the next."""
        if self._profile is not None:
            self._finish(step - 1)
        if self._is_asked():
            self._window = range(step, step + self._steps)
            logger.info("steps %d to %d are profiled into %s", step, step + self._steps - 1, self._folder)
        self._start_if_due(step)

    def _start_if_due(self, step: int) -> None:
        if not self._is_chosen or step not in self._window or step > self._last_step:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._plain_wait = vars(dist.Work)["wait"]  # gloo works in threads that the profiler does not see
        dist.Work.wait = _recorded(self._plain_wait)  # type: ignore[method-assign]
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()
        self._started_at = time.perf_counter()

    def _stop(self) -> Any:
        """The profile, stopped."""
        taken, self._profile = self._profile, None
        taken.stop()
        dist.Work.wait = self._plain_wait  # type: ignore[method-assign]
        return taken

    def _finish(self, step: int) -> None:
        """Stop and write; a disk that is full costs the trace, not the run."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started_at
        taken = self._stop()
        path = self._folder / f"rank_{self._rank}_step_{step}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            write_trace(taken, path)
            title = f"rank {self._rank}, step {step}, {seconds:.3f} s"
            write_atomic(
                path.with_suffix("").with_suffix(".txt"),
                operator_table(taken.key_averages(), title, seconds=seconds),
            )
        except OSError as error:
            logger.warning(
                "the profile %s cannot be written (%s; %s); the run continues",
                path,
                error,
                free_space(self._folder),
            )
            return
        logger.info("profile of step %d: %s (open it at ui.perfetto.dev), and a table beside it", step, path)


def _recorded(wait: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(_WAIT):
            return wait(*args, **kwargs)

    return recorded


def write_trace(taken: Any, path: Path) -> None:
    """Write a stopped profile as a compressed Chrome trace, whole or not at all.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    plain, packed = path.with_name(f".{path.name}.plain"), path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        taken.export_chrome_trace(str(plain))
        _require_whole(plain)
        with open(plain, "rb") as source, open(packed, "wb") as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=3) as target:
                shutil.copyfileobj(source, target, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(packed, path)
        sync_folder(path.parent)
    finally:
        plain.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)


def _require_whole(path: Path) -> None:
    """The profiler's own writer does not report a full disk."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError("the trace is cut short")


def operator_table(averages: Iterable[Any], title: str, *, seconds: float) -> str:
    """What took longest, by self time, and the share of communication.

    Args:
        averages: torch's `key_averages()` of a profile.
        title: first line.
        seconds: wall time of the step.
    """
    averages = list(averages)
    on_device = any(each.device_type != DeviceType.CPU for each in averages)
    if on_device:  # its kernels, without what only names groups of them
        averages = [
            each for each in averages if each.device_type != DeviceType.CPU and not each.is_user_annotation
        ]
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    rows = sorted(((getattr(each, name) / 1e6, each.count, each.key) for each in averages), reverse=True)
    total = sum(own for own, _, _ in rows)
    moved = sum(own for own, _, key in rows if key.startswith(_COMMUNICATION))
    shown, others = rows[:_ROWS], rows[_ROWS:]
    rest = sum(own for own, _, _ in others)
    lines = [
        title,
        f"communication {moved:.3f} s, {_percent(moved, seconds)} of the step, also where computation covers it",
        "",
        f"{'self s':>9} {'of all':>7} {'calls':>7}  on the {'device' if on_device else 'host'}",
        *(f"{own:9.4f} {_percent(own, total):>7} {count:7d}  {key}" for own, count, key in shown),
        f"{rest:9.4f} {_percent(rest, total):>7} {'':7}  {len(others)} others",
    ]
    return "\n".join(lines) + "\n"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
