"""What verbs that read or write checkpoints share: a byte counter, casts, how closely files are looked at."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_v2pe.core.env import Launcher, launcher
from megatron_v2pe.core.errors import ConfigError

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 15.0


class ByteProgress:
    """Bytes, rate and time left, on stderr: a bar on a terminal, elsewhere a log line every 15 seconds.

    Args:
        verb: what is going on.
        rank: of several ranks that share the work, only the first one speaks.
    """

    def __init__(self, verb: str, *, rank: int = 0) -> None:
        self._verb, self._rank = verb, rank
        self._done, self._total = 0, 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(desc=verb, unit="B", unit_scale=True, disable=None if rank == 0 else True)

    def expect(self, num_bytes: int) -> None:
        """Say how many bytes there will be; their rate counts from here."""
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
    """How far it is, how fast, and how long it may take."""
    rate = done / seconds
    left = f", {(total - done) / rate:.0f} s left" if total else ""
    of_all = f" of {total / 1e9:.2f}" if total else ""
    return f"{verb}: {done / 1e9:.2f}{of_all} GB, {rate / 1e6:.0f} MB/s{left}"


@contextmanager
def byte_progress(verb: str) -> Iterator[ByteProgress]:
    """Count bytes for a verb that runs in one process.

    Raises:
        ConfigError: torchrun started several.
    """
    refuse_ranks(verb)
    progress = ByteProgress(verb)
    try:
        yield progress
    finally:
        progress.close()


@contextmanager
def shared_progress(verb: str) -> Iterator[ByteProgress]:
    """Join the other ranks where torchrun started several, and count this one's bytes."""
    from megatron_v2pe.checkpoint.dist_io import launched_ranks

    with launched_ranks():
        progress = ByteProgress(verb, rank=launcher().rank)
        try:
            yield progress
        finally:
            progress.close()


def refuse_ranks(verb: str) -> None:
    """Raise ConfigError where torchrun started several processes, which would all do the same."""
    if launcher().world_size > 1:
        raise ConfigError(
            f"{verb} runs in one process, {launcher().world_size} were started; leave torchrun out"
        )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for verbs that write weights."""
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float16", "float32"),
        default="keep",
        help="cast floating point tensors, and torch_dtype of config.json; default: every tensor keeps its own",
    )


def add_verify_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--verify-checkpoint`, for verbs that read a checkpoint."""
    parser.add_argument(
        "--verify-checkpoint",
        choices=("sizes", "full"),
        default="sizes",
        help="look at the checkpoint's files first: their sizes (default), or hash all of them, which also finds "
        "flipped bits and reads every byte once more",
    )


def check_files(args: argparse.Namespace) -> Launcher:
    """Look at the files of `args.checkpoint` as `--verify-checkpoint` says; under torchrun each process hashes a share.

    Returns:
        What the launcher says about this process.

    Raises:
        CheckpointError: names the damaged files that this process found.
    """
    from megatron_v2pe.checkpoint.folder import read_info

    here = launcher()
    read_info(args.checkpoint, verify=args.verify_checkpoint, rank=here.rank, world_size=here.world_size)
    return here
