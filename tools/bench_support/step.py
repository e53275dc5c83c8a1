"""How a step is measured by the benchmarks: the best time of several, on several ranks, on which machine.

The step itself is `megatron_v2pe/planning/measured_step.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_v2pe.parallel.topology import shutdown


def best_seconds(action: Callable[[], Any], repeats: int) -> float:
    """Least processor time of several calls of this process, after one that warms up.

    One thread computes, so this is the time on an idle machine; other work moves it little.
    """
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def on_ranks(body: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of body(*args) on `world_size` processes of one thread each, joined over gloo."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank_main, args=(body, rank, world_size, folder, results, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"a rank failed: exit codes {[process.exitcode for process in ranks]}")
        return [result for _, result in sorted(results.get() for _ in ranks)]


def _rank_main(
    body: Callable[..., Any], rank: int, world_size: int, folder: str, results: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=world_size)
    results.put((rank, body(*args)))
    shutdown()


def machine() -> str:
    """What the figures were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{cores} cores{load}, torch {torch.__version__}, one thread per process"
