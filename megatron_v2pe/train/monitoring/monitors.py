"""All that looks at the steps of a run from outside, as one: entered before the first, told of every next."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Protocol


class Watcher(AbstractContextManager[Any], Protocol):
    """Entered before the first step, left behind the last or at an error."""

    def beat(self, step: int) -> None:
        """Step `step` is under way now."""


class Monitors:
    """Several monitors as one.

    Args:
        monitors: in the order in which they are entered and told; left in reverse.
        told: only told, by whoever entered it.
    """

    def __init__(self, *monitors: Watcher, told: Watcher) -> None:
        self._watchers, self._told, self._stack = monitors, told, ExitStack()

    def __enter__(self) -> Monitors:
        for watcher in self._watchers:
            self._stack.enter_context(watcher)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def beat(self, step: int) -> None:
        """Step `step` is under way now."""
        for watcher in (*self._watchers, self._told):
            watcher.beat(step)
