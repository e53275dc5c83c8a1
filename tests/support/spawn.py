"""Run a function on several gloo ranks of this machine, and say what went wrong when one of them fails.

    results = run_ranks(body, 2, argument, timeout=60)      # body(rank, world_size, argument) on each rank

Ranks meet through a file, so that parallel test workers never fight over a port. When a rank fails the others
are stopped and its traceback is in the error; when time is up every rank's stack is.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support.warm import warm_context

GRACE_SECONDS = 3.0  # for the peers of a failed rank to fail too, and for stacks to be written


class RanksFailedError(AssertionError):
    """A rank raised, died or did not finish; the message carries what every rank wrote."""


def run_ranks(
    body: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, is_warm: bool = True
) -> list[Any]:
    """Call `body(rank, world_size, *args)` on `world_size` new processes that share a gloo process group.

    Args:
        body: function of a module, importable by name; its arguments and results must be picklable.
        world_size: number of ranks.
        timeout: seconds until all must have returned.
        is_warm: megatron-core is imported already (see `warm`); False where something must come before it.

    Returns:
        What each rank returned, by rank.

    Raises:
        RanksFailedError: a rank failed or time is up.
    """
    context = warm_context() if is_warm else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank_main,
                args=(body, rank, world_size, folder, timeout, dict(os.environ), args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        failure = _wait(ranks, timeout)
        if failure:
            raise RanksFailedError(f"{failure}\n{_logs(Path(folder), world_size)}")
        return [_result(Path(folder), rank) for rank in range(world_size)]


def _wait(ranks: list[Any], timeout: float) -> str:
    """Wait for all, stop them on the first failure; returns what failed or ""."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.exitcode for process in ranks]
        if all(code == 0 for code in codes):
            return ""
        if any(code not in (None, 0) for code in codes):
            time.sleep(GRACE_SECONDS)
            return _stop(ranks, f"exit codes by rank: {codes}")
        time.sleep(0.02)
    return _stop(ranks, f"not finished after {timeout:g} s")


def _stop(ranks: list[Any], reason: str) -> str:
    running = [process for process in ranks if process.exitcode is None]
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)  # writes its stacks
    if running:
        time.sleep(0.5)
    for process in running:
        process.kill()
        process.join()
    return reason


def _rank_main(
    body: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    environment: dict[str, str],
    args: Any,
) -> None:
    os.environ.update(environment)  # a warm process has that of its server
    log = open(Path(folder, f"log_{rank}"), "w", buffering=1)  # noqa: SIM115 (lives as long as the process)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    try:
        result = _joined(body, rank, world_size, folder, timeout, args)
        import torch

        torch.save(result, Path(folder, f"result_{rank}"))
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)  # without waiting for peers that wait for us
    os._exit(0)


def _joined(
    body: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: Any
) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    result = body(rank, world_size, *args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def _logs(folder: Path, world_size: int) -> str:
    texts = [Path(folder, f"log_{rank}").read_text(errors="replace") for rank in range(world_size)]
    return "\n".join(f"----- rank {rank} -----\n{text[-8000:]}" for rank, text in enumerate(texts))


def _result(folder: Path, rank: int) -> Any:
    import torch

    return torch.load(folder / f"result_{rank}", weights_only=False)
