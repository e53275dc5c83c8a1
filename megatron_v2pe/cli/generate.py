"""`generate`: one greedy answer to a question about images, streamed as it is made."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import (
    add_parallel_sizes,
    add_verify_checkpoint,
    check_files,
    parallel_config,
)
from megatron_v2pe.core.env import launcher

NAME = "generate"
HELP = """answer a question about images, greedily

Example:  megatron-v2pe generate ckpt --image page1.png --image page2.png --stride 64 "What is the total?"

A long prompt is cut over processes (--cp), a large model too (--tp, --pp):
    torchrun --nproc-per-node 8 -m megatron_v2pe generate ckpt --cp 8 --image scan.png "What is the total?"

Without --stride a visual token advances the position as a text token does. Write <image> in the question where
each image belongs, or leave it out to have them put first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="checkpoint folder (of import-hf or of a run)")
    parser.add_argument("question", help="text of the question")
    parser.add_argument("--image", action="append", default=[], help="image file; repeat for several")
    parser.add_argument("--stride", type=int, default=0, help="V2PE stride, 1..tokens per tile")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument(
        "--max-tokens", type=int, default=1_000_000, help="longest prompt (default 1,000,000)"
    )
    add_parallel_sizes(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="compute dtype")
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Answer; the text goes to stdout, everything else to stderr."""
    from megatron_v2pe.inference.chat import Chat
    from megatron_v2pe.parallel.topology import shutdown

    parallel = parallel_config(args)
    check_files(args)
    limits = {"stride": args.stride, "dtype": args.dtype, "max_tokens": args.max_tokens}
    chat = Chat(args.checkpoint, parallel=parallel, **limits)
    is_shown = launcher().rank == 0
    for part in chat.answer(args.question, args.image, max_new_tokens=args.max_new_tokens):
        if is_shown:
            sys.stdout.write(part)
            sys.stdout.flush()
    if is_shown:
        sys.stdout.write("\n")
    shutdown()
    return 0
