"""Where the time from the start of the process to the end of the first step goes.

    process created --imports--> train() --checks--> ... --first batch--> --first step--> one log line, start_up.json

Phases follow each other without gaps, so that they add up. Rank 0 reports its own; a rank that comes later shows in
the phase in which rank 0 waits for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_v2pe.core.files import write_atomic

logger = logging.getLogger(__name__)

FILE = "start_up.json"


class StartupTimer:
    """Stopwatch of one start. The clock is the machine's, because the process was created by its time.

    Args:
        on_done: gets the name of every phase that is done.
    """

    def __init__(self, on_done: Callable[[str], None] | None = None) -> None:
        self._on_done = on_done
        self.phases: dict[str, float] = {}
        self._since = psutil.Process().create_time()
        self._is_over = False

    def done(self, phase: str) -> None:
        """A phase ends here and the next begins; one that comes twice is added up."""
        now = time.time()
        self.phases[phase] = self.phases.get(phase, 0.0) + max(0.0, now - self._since)
        self._since = now
        if self._on_done is not None:
            self._on_done(phase)

    def after_step(self, run_dir: Path, *, rank: int, step_seconds: float) -> None:
        """Report the phases after the first step, whose training took `step_seconds`; later calls do nothing."""
        if self._is_over:
            return
        self._is_over = True
        self.done("first batch")
        first_step = min(step_seconds, self.phases["first batch"])
        self.phases["first batch"] -= first_step
        self.phases["first step"] = first_step
        if rank == 0:
            write_atomic(run_dir / FILE, json.dumps({"seconds": self.phases}) + "\n")
            logger.info("start-up took %s", self)

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.phases.items())
        return f"{sum(self.phases.values()):.1f} s: {parts}"
