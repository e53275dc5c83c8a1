"""What a step of a run costs beside data and training: metrics, sinks, guards, looking for signals; for bench_run.py.

The real `train()` runs with all its monitors on, but its steps take no time: from the second on they return the report
of the first, on the packs of the first. What is left is everything that a run does around `train_step`, so nothing has
to be subtracted, and other work on the machine hardly moves the processor time. The bare loop to compare with is empty.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.core.logging import setup_logging
from megatron_v2pe.preflight.disk import run_sizes
from megatron_v2pe.train import loop
from megatron_v2pe.train.setup import Outside

WARM_UP = 50


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step, in seconds.

    Attributes:
        processor_s: of all threads of the process.
        wall_s: with waits for the disk.
    """

    processor_s: float
    wall_s: float


def measure(config_path: Path, overrides: list[str], *, steps: int) -> Cost:
    """Run `steps` steps that take no time; the cost of each. In this process, on one rank."""
    config = load_run_config(config_path, [*overrides, f"optim.steps={10**6}"])
    torch.set_num_threads(1)
    setup_logging(0)
    real_step, real_batches = loop.train_step, loop.timed_batches
    reports: list[Any] = []
    marks: list[tuple[float, float]] = []

    def instant(*args: Any, **kwargs: Any) -> Any:
        if not reports:
            reports.append(real_step(*args, **kwargs))
        return reports[0]

    def same(loader: Any) -> Iterator[Any]:
        first = next(iter(real_batches(loader)))
        for number in range(WARM_UP + steps + 1):
            if number in (WARM_UP, WARM_UP + steps):
                marks.append((time.process_time(), time.perf_counter()))
            yield first

    loop.train_step, loop.timed_batches = instant, same
    try:
        loop.train(config, Outside(sizes_of=run_sizes))
    finally:
        loop.train_step, loop.timed_batches = real_step, real_batches
    (cpu, wall), (cpu_end, wall_end) = marks
    return Cost(processor_s=(cpu_end - cpu) / steps, wall_s=(wall_end - wall) / steps)
