"""Log lines of a run with many ranks: rank 0 speaks, the others only warn.

Everything goes to stderr, so that stdout stays what a command was asked for.
"""

from __future__ import annotations

import logging
import sys
import warnings

_ROOT = "megatron_v2pe"


class _RankFilter(logging.Filter):
    """Adds the rank to a record."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        return True


def get_logger(name: str) -> logging.Logger:
    """Logger of a module of this package; call it with `__name__`."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def quiet_dependencies() -> None:
    """Hide warnings that megatron-core and torch's process groups address to their own developers.

    At every start megatron-core tells five times that apex and Transformer Engine are missing (`doctor` says it
    once, with what follows), and torch announces renamed functions that megatron-core calls. They would bury
    the one line that a user needs. Warnings of this package and of the user's code stay.
    """
    for module in (r"megatron\.core", r"torch\.distributed"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def setup_logging(rank: int) -> None:
    """Send this package's log to stderr: INFO and above on rank 0, WARNING and above elsewhere.

    Calling it again replaces the handler, so that a second call (tests, notebooks) does not double lines.
    """
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
