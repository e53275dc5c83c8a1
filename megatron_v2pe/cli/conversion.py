"""What verbs that read or write checkpoints share: casts, and how closely files are looked at."""

from __future__ import annotations

import argparse

from megatron_v2pe.core.env import Launcher, launcher
from megatron_v2pe.core.errors import ConfigError


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
    from megatron_v2pe.checkpoint.files.folder import read_info

    here = launcher()
    read_info(args.checkpoint, verify=args.verify_checkpoint, rank=here.rank, world_size=here.world_size)
    return here
