"""Progress of long reads and writes: bytes done, rate, time left."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 15.0


class ByteProgress:
    """Bytes, rate and time left, on stderr: a bar on a terminal, elsewhere a log line every 15 seconds.

    Args:
        verb: the command that shows the progress.
        rank: of several ranks that share the work, only rank 0 shows anything.
    """

    def __init__(self, verb: str, *, rank: int = 0) -> None:
        self._verb = verb
        self._rank = rank
        self._done = 0
        self._total = 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(desc=verb, unit="B", unit_scale=True, disable=None if rank == 0 else True)

    def expect(self, num_bytes: int) -> None:
        """Set the total; the rate is measured from here."""
        self._total = num_bytes
        self._start = self._last = time.monotonic()
        self._bar.reset(total=num_bytes)

    def __call__(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._bar.disable and self._rank == 0 and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            logger.info("%s", progress_line(self._verb, self._done, self._total, now - self._start))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def progress_line(verb: str, done: int, total: int, seconds: float) -> str:
    """Bytes done, of how many, rate and time left, in one line."""
    rate = done / seconds
    left = f", {(total - done) / rate:.0f} s left" if total else ""
    of_all = f" of {total / 1e9:.2f}" if total else ""
    return f"{verb}: {done / 1e9:.2f}{of_all} GB, {rate / 1e6:.0f} MB/s{left}"
