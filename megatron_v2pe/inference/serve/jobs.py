"""Requests between the HTTP side, which waits for them, and the ranks, which answer them.

HTTP thread --submit--> [ bounded queue ] --take--> worker (rank 0)
<-- pieces, usage, error -- Job.put
--cancel-------------------->
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_v2pe.inference.serve.wire import ChatRequest, Piece, RequestError, Usage

Event = Piece | RequestError


@dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        number: unique in this server.
        request: what is asked.
        deliver: hands an event to whoever waits; called from the worker's thread.
        usage: filled while it is answered.
        arrived: seconds of the monotonic clock.
        is_cancelled: nobody waits any more.
    """

    number: int
    request: ChatRequest
    deliver: Callable[[Event], None]
    usage: Usage = field(default_factory=Usage)
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False


class Inbox:
    """The bounded queue of requests.

    Args:
        max_waiting: requests that may wait; more are refused.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._is_draining = False

    def submit(self, request: ChatRequest, deliver: Callable[[Event], None]) -> Job:
        """Put a request at the end.

        Raises:
            RequestError: 429 when the queue is full, 503 when the server is about to end.
        """
        with self._changed:
            if self._is_draining:
                raise RequestError(503, "draining", "the server is about to end and takes no more requests")
            if len(self._waiting) >= self.max_waiting:
                raise RequestError(
                    429, "queue_full", f"{self.max_waiting} requests are waiting; try again later"
                )
            job = Job(number=next(self._numbers), request=request, deliver=deliver)
            self._waiting.append(job)
            self._changed.notify_all()
            return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more requests; those that are here are still answered."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()

    @property
    def is_draining(self) -> bool:
        """No more requests are taken."""
        return self._is_draining

    @property
    def num_waiting(self) -> int:
        """Requests that nobody has begun to answer."""
        return len(self._waiting)

    def take(self, max_choices: int) -> Job | None:
        """The request that came first; None where there is none, or it wants more answers than that."""
        with self._changed:
            fits = self._waiting and self._waiting[0].request.num_choices <= max_choices
            return self._waiting.popleft() if fits else None

    def wait(self, seconds: float) -> None:
        """Until something comes or the server is to end, for some seconds at most."""
        with self._changed:
            if not self._waiting and not self._is_draining:
                self._changed.wait(seconds)
