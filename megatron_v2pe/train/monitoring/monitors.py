"""All that observes the steps of a run from outside, as one: entered before the first, notified of every next."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Protocol

from megatron_v2pe.train.monitoring.rank_monitor import RankMonitor
from megatron_v2pe.train.monitoring.watchdog import Watchdog


class Monitor(AbstractContextManager[Any], Protocol):
    """Entered before the first step, left after the last or at an error."""

    def beat(self, step: int) -> None:
        """Step `step` is under way now."""


class Monitors:
    """Several monitors as one.

    Args:
        monitors: in the order in which they are entered and notified; left in reverse.
        entered: notified after them, and entered and left by whoever made it.
    """

    def __init__(self, *monitors: Monitor, entered: Monitor) -> None:
        self._monitors = monitors
        self._entered = entered
        self._stack = ExitStack()

    def __enter__(self) -> Monitors:
        for monitor in self._monitors:
            self._stack.enter_context(monitor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def beat(self, step: int) -> None:
        """Step `step` is under way now."""
        for monitor in (*self._monitors, self._entered):
            monitor.beat(step)

    def keep_alive(self, step: int) -> None:
        """Something other than a step is making progress: those that wait for the next step wait longer."""
        for monitor in (*self._monitors, self._entered):
            if isinstance(monitor, Watchdog | RankMonitor):
                monitor.beat(step)
