"""What verbs that read checkpoints share: a byte counter, and how closely the files are looked at."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_v2pe.core.env import Launcher, launcher
from megatron_v2pe.core.errors import ConfigError


@contextmanager
def byte_progress(verb: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told each batch of bytes and counts them on stderr, if that is a terminal.

    Raises:
        ConfigError: torchrun started several processes, which would all write the same folder.
    """
    if launcher().world_size > 1:
        raise ConfigError(
            f"{verb} converts in one process, {launcher().world_size} were started; leave torchrun out"
        )
    with tqdm(desc=verb, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance


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
