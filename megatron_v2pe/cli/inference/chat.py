"""`chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import check_files
from megatron_v2pe.cli.inference.arguments import (
    add_model_arguments,
    add_sampling_arguments,
    chat_options,
    sampling_of,
)
from megatron_v2pe.core.env import launcher

NAME = "chat"
HELP = """talk to a checkpoint about images and videos; /help lists the commands

Example:  megatron-v2pe chat ckpt
    > /image scan.png
    > What is the total?

A further question computes its own tokens only. Under torchrun (--tp, --pp, --cp) rank 0 reads and the others follow:
    torchrun --nproc-per-node 8 -m megatron_v2pe chat ckpt --cp 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--keep-tokens",
        type=int,
        default=2_000_000,
        metavar="N",
        help="tokens of conversations that are kept for further questions (default 2,000,000)",
    )


def run(args: argparse.Namespace) -> int:
    """Talk; answers go to stdout, everything else to stderr."""
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.inference.chat import Chat
    from megatron_v2pe.inference.terminal import Terminal
    from megatron_v2pe.parallel.topology import shutdown

    if args.keep_tokens < 0:
        raise ConfigError(f"--keep-tokens is {args.keep_tokens}, but must be at least 0")
    sampling, options = sampling_of(args), chat_options(args, keep_tokens=args.keep_tokens)
    check_files(args)
    chat = Chat(args.checkpoint, options)
    _edit_lines()
    Terminal(chat, sampling, read=_read, write=_write, say=_say).run()
    shutdown()
    return 0


def _edit_lines() -> None:
    """Arrow keys and history, where Python was built with them."""
    if launcher().rank == 0 and sys.stdin.isatty():
        try:
            import readline  # noqa: F401 (input() uses it once it is imported)
        except ImportError:
            _say("this Python has no readline; lines cannot be edited")


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
