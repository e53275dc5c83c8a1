"""Runs fuzzed cases and judges how each ended: fine, refused by a named error, or a failure.

A failure is an error that is none of the package's own, a case of more than 5 s of a core (or of 25 s in all), a
message longer than a few screens, or a process that grew by more than 1 GiB. Cases run in a process of their own with
the limits enforced, so that a crash of a library, a hang or a flood of memory is a row of the report too. A case
depends on kind, seed and number alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_SECONDS = 5.0
MAX_BYTES = 2**30
KINDS = ("checkpoints", "folders", "tokenizers", "records", "images")
_MARGIN_S = 20.0
_STARTUP_S = 240.0
_PREPARED = "prepared"


@dataclass(frozen=True)
class Failure:
    """A case that ended otherwise than it may."""

    number: int
    change: str
    reason: str


@dataclass
class Report:
    """How the cases of a kind ended."""

    kind: str
    seed: int
    count: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_mib: float = 0.0

    def text(self) -> str:
        """The report, a line for each failure."""
        endings = ", ".join(f"{count} {name}" for name, count in self.endings.most_common())
        head = (
            f"{self.kind}: {self.count} cases of seed {self.seed}: {endings}; slowest {self.slowest_s:.2f} s, memory "
            f"{self.largest_mib:.0f} MiB; {len(self.failures)} failures"
        )
        rows = [f"  case {each.number}: {each.change}\n    {each.reason}" for each in self.failures]
        return "\n".join([head, *rows])


def fuzz(kind: str, *, count: int, seed: int, first: int = 0, start: str = "spawn") -> Report:
    """Run cases first..first+count-1 of a kind; a worker that dies is replaced, and the others are still run.

    Args:
        kind: one of `KINDS`.
        count: number of cases.
        seed: of their changes.
        first: number of the first.
        start: how workers are started; a fork of a process in which torch has threads can hang.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, known are {', '.join(KINDS)}")
    report = Report(kind, seed)
    context = multiprocessing.get_context(start)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        number = first
        while number < first + count:
            number = _batch(context, report, Path(root), number, first + count)
    return report


def _fuzzer(kind: str) -> Any:
    return importlib.import_module(f"tests.support.fuzzing.{kind}").Fuzzer()


def _batch(context: Any, report: Report, root: Path, number: int, stop: int) -> int:
    """Cases from `number` on, until all are done or the worker died; returns the next number."""
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(sender, report.kind, report.seed, root, number, stop))
    worker.start()
    sender.close()
    with contextlib.suppress(EOFError):
        if receiver.poll(_STARTUP_S):
            receiver.recv()
    while number < stop:
        if not receiver.poll(MAX_SECONDS + _MARGIN_S):
            worker.kill()
            _fail(report, number, "?", f"no answer after {MAX_SECONDS + _MARGIN_S:.0f} s")
            break
        try:
            change, ending, reason, seconds, mib = receiver.recv()
        except EOFError:
            worker.join()
            _fail(report, number, "?", f"the process died with exit code {worker.exitcode}")
            break
        report.slowest_s, report.largest_mib = max(report.slowest_s, seconds), max(report.largest_mib, mib)
        if reason:
            _fail(report, number, change, reason)
        else:
            report.count += 1
            report.endings[ending] += 1
        number += 1
    else:
        worker.join()
        return number
    worker.join()
    return number + 1


def _fail(report: Report, number: int, change: str, reason: str) -> None:
    report.count += 1
    report.endings["failed"] += 1
    report.failures.append(Failure(number, change, reason))


def _work(sender: Any, kind: str, seed: int, root: Path, number: int, stop: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.disable(logging.WARNING)
    fuzzer = _fuzzer(kind)
    for name in fuzzer.modules:
        importlib.import_module(name)
    if not (root / _PREPARED).exists():
        fuzzer.prepare(root)
        (root / _PREPARED).touch()
    sender.send(None)
    signal.signal(signal.SIGPROF, _too_slow)
    before = _peak_bytes()
    for i in range(number, stop):
        folder = root / f"case-{i}"
        folder.mkdir()
        started = time.process_time()
        change, ending, reason = _case(fuzzer, root, folder, random.Random(f"{kind}/{seed}/{i}"))
        seconds, grown = time.process_time() - started, _peak_bytes() - before
        if not reason and grown > MAX_BYTES:
            reason = f"took {grown / 2**20:,.0f} MiB"
        sender.send((change, ending, reason, seconds, grown / 2**20))
        before = max(before, _peak_bytes() if reason else 0)
        shutil.rmtree(folder, ignore_errors=True)
    sender.close()


def _case(fuzzer: Any, root: Path, folder: Path, generator: random.Random) -> tuple[str, str, str]:
    """What was changed, how it ended, and why that is a failure (empty when it is none)."""
    from megatron_v2pe.core.errors import V2PEError

    change = "?"
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        change = fuzzer.mutate(root, folder, generator)
        fuzzer.run(folder)
        return change, "read", ""
    except V2PEError as error:
        text = str(error)
        too_long = (
            f"a message of {len(text)} characters: {text[:200]}" if len(text) > _LONGEST_MESSAGE else ""
        )
        return change, type(error).__name__, too_long
    except BaseException as error:  # this is what is looked for
        return change, "failed", f"{type(error).__name__}: {str(error)[:200]} {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


_LONGEST_MESSAGE = 6000


class TooSlowError(BaseException):
    """A case that takes longer than it may; no handler of errors stops it."""


def _too_slow(signum: int, frame: Any) -> None:
    raise TooSlowError(f"more than {MAX_SECONDS} s of a core")


def _place(error: BaseException) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "megatron_v2pe" in frame.filename
    ]
    return f"({frames[-1].filename.rpartition('megatron_v2pe/')[2]}:{frames[-1].lineno})" if frames else ""


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
