"""Parts made by any number of processes.

    parts --few in flight--> worker: compose, check, flush images, write the part --> number of records

A worker stops between two samples when the run fails or is interrupted, and at once when the process that started it is
gone: a part is written whole or not at all, so nothing is lost but time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path

from tqdm import tqdm

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.processes import end_with_parent, worker_context
from megatron_v2pe.synthesis.document.compose import Composer, Materials
from megatron_v2pe.synthesis.material.pictures import SERVER_IMPORTS, ImageStore
from megatron_v2pe.synthesis.parts import OutputPart

_IN_FLIGHT_PER_WORKER = 2


class Stopped(Exception):  # noqa: N818 - it names what is
    """The run has ended while a part was being made."""


class PartMaker:
    """Makes parts, whose records are checked; one in each process.

    Args:
        materials: what samples are made from.
        out: output folder.
    """

    def __init__(self, materials: Materials, out: Path) -> None:
        self._store = ImageStore(out)
        self._composer = Composer(materials, self._store)

    def make(self, part: OutputPart, *, on_sample: Callable[[], object]) -> int:
        """Make and write all samples of a part; returns their number.

        Args:
            part: what to make.
            on_sample: called before each sample; may raise `Stopped`.
        """
        lines = []
        for spec in part.specs:
            on_sample()
            lines.append(json.dumps(self._composer.compose(spec)))
        self._store.flush()
        write_atomic(part.path, "".join(f"{line}\n" for line in lines))
        return len(lines)


def make_parts(parts: Sequence[OutputPart], materials: Materials, *, out: Path, workers: int) -> None:
    """Make parts, with a progress bar.

    Args:
        parts: what to make.
        materials: what samples are made from.
        out: output folder.
        workers: processes; 1 works in this one.

    Raises:
        DataError: a sample cannot be made, see `Composer.compose`.
        ConfigError: a worker was killed.
    """
    workers = min(workers, len(parts))
    total = sum(len(part.specs) for part in parts)
    with tqdm(total=total, desc="records", unit="record", disable=None) as bar:
        if workers <= 1:
            maker = PartMaker(materials, out)
            for part in parts:
                maker.make(part, on_sample=bar.update)
            return
        context = worker_context(SERVER_IMPORTS)
        stop = context.Event()
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(materials, out, stop)
        ) as executor:
            for made in _results(executor, parts, in_flight=workers * _IN_FLIGHT_PER_WORKER, stop=stop):
                bar.update(made)


def _results(
    executor: Executor, parts: Sequence[OutputPart], *, in_flight: int, stop: Event
) -> Iterator[int]:
    """Numbers of records as parts finish; the first failure stops everything."""
    waiting = list(reversed(parts))
    running: set[Future[int]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < in_flight:
                running.add(executor.submit(_make_in_worker, waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ConfigError(
            "--workers: a worker process was killed, mostly for want of memory; start again with fewer workers, "
            "what is finished is kept"
        ) from None
    finally:
        stop.set()
        executor.shutdown(wait=False, cancel_futures=True)


# A worker process's own, because tasks bring only their part.
_maker: PartMaker | None = None
_stop: Event | None = None


def _start_worker(materials: Materials, out: Path, stop: Event) -> None:
    global _maker, _stop
    end_with_parent()
    _maker, _stop = PartMaker(materials, out), stop


def _make_in_worker(part: OutputPart) -> int:
    assert _maker is not None
    return _maker.make(part, on_sample=_raise_if_stopped)


def _raise_if_stopped() -> None:
    if _stop is not None and _stop.is_set():
        raise Stopped
