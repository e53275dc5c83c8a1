"""Log lines of a run with many ranks: rank 0 logs all, the others only warnings. Everything goes to stderr.

17:20:01 step 7/1000  loss 2.1234 ...              rank 0, INFO
17:20:01 rank 3 WARNING disk is slow               everything else
"""

from __future__ import annotations

import logging
import sys
import warnings

_ROOT = "megatron_v2pe"


class _RankFormatter(logging.Formatter):
    """Names rank and level where they are not what a person expects."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._rank = rank

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        if self._rank != 0 or record.levelno != logging.INFO:
            record.message = f"rank {self._rank} {record.levelname} {record.message}"
        return super().formatMessage(record)


# Log lines of megatron-core 0.19 about how it is called, by the module that writes them.
_DEVELOPER_LINES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout",
}


def _is_for_users(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_DEVELOPER_LINES[record.name])


def quiet_dependencies() -> None:
    """Hide warnings that megatron-core and torch's process groups address to their own developers.

    At every start megatron-core says five times that apex and Transformer Engine are missing (`doctor` says it
    once, with what follows), and torch announces renamed functions that megatron-core calls. They would bury
    the one line that a user needs. Warnings of this package and of the user's code stay.
    """
    for module in (r"megatron\.core", r"torch\.distributed"):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    for name in _DEVELOPER_LINES:
        logging.getLogger(name).addFilter(_is_for_users)


def setup_logging(rank: int) -> None:
    """Send this package's log to stderr: INFO and above on rank 0, WARNING and above elsewhere.

    Calling it again replaces the handler, so that a second call (tests, notebooks) does not double lines.
    """
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RankFormatter(rank))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
