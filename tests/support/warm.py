"""Processes with torch and megatron-core imported already, for tests that need many of them.

    server, imports once --fork--> rank 0, rank 1, ...          run_verb("train", "run.yaml", ranks=2)

Importing costs each new process 4 s of a core, a launcher 3 s more, which is most of the time of a tiny run. A forked
process gets its own environment, streams and launcher variables, and calls the entry point that `python -m` calls.
Tests about launching, signals and restarts start real commands instead (`tiny.train_command`).
"""

import atexit
import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.env import child_environment

ENTRY = "megatron_v2pe.cli.main:main"
_PRELOADED = ("megatron_v2pe.train.loop", "megatron_v2pe.evaluation.retrieval.runner", "tests.support.parity")
_GRACE_SECONDS = 3.0  # for the peers of a failed rank to say what they saw


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended: the largest exit code of its ranks, their outputs one after the other."""

    returncode: int
    stdout: str
    stderr: str


def warm_context() -> Any:
    """What to make processes with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def run_verb(
    *arguments: object,
    ranks: int = 1,
    timeout: float = 240.0,
    entry: str = ENTRY,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> Done:
    """Run `megatron-v2pe ARGUMENTS` to its end, on ranks that are set up as torchrun does.

    Args:
        arguments: verb and what follows, as text.
        ranks: processes; one gets no launcher variables.
        timeout: seconds, after which all are killed.
        entry: `module:function`, called with the arguments, returns an exit code.
        variables: changes of the environment.
        folder: working folder of the ranks; this process's where None.
        kill_when: looked at all the time; once it is true all ranks are killed -9.
    """
    with tempfile.TemporaryDirectory() as outputs:
        processes = started_verb(
            *arguments, ranks=ranks, entry=entry, variables=variables, outputs=outputs, folder=folder
        )
        _wait(processes, timeout, kill_when or (lambda: False))
        texts = {name: _joined(Path(outputs), name, ranks) for name in ("stdout", "stderr")}
    codes = [process.exitcode for process in processes]
    return Done(returncode=next((code for code in codes if code), 0), **texts)


def started_verb(
    *arguments: object,
    outputs: str,
    ranks: int = 1,
    entry: str = ENTRY,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[Any]:
    """Processes of `run_verb`, running; their outputs go to the folder `outputs`."""
    context, port = warm_context(), _free_port()
    texts = [str(argument) for argument in arguments]
    processes = [
        context.Process(
            target=_rank_main,
            args=(
                entry,
                texts,
                child_environment(**{**_launched(rank, ranks, port), **(variables or {})}),
                outputs,
                str(folder or Path.cwd()),
                rank,
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    one_thread = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {name: str(value) for name, value in number.items()} | one_thread


def _wait(processes: list[Any], timeout: float, kill_when: Callable[[], bool]) -> None:
    """Wait for all; what still runs some seconds after a failure, when time is up or on request, is killed."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < end and not kill_when():
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()


def _rank_main(
    entry: str, arguments: list[str], environment: dict[str, str], outputs: str, folder: str, rank: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(outputs, f"{name}_{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["megatron-v2pe", *arguments]
    module, function = entry.split(":")
    try:
        code = getattr(importlib.import_module(module), function)(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # which multiprocessing leaves out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _joined(folder: Path, name: str, ranks: int) -> str:
    files = [folder / f"{name}_{rank}" for rank in range(ranks)]
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
