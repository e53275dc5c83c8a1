"""`convert-hf`: a Hugging Face InternVL folder in the other Hugging Face format."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import add_cast, add_format, parse_size, shared_progress
from megatron_v2pe.core.env import launcher

NAME = "convert-hf"
HELP = """turn a GitHub folder (InternVLChatModel) into a native one (-hf, InternVLForConditionalGeneration), or back

Example:  megatron-v2pe convert-hf InternVL3_5-8B InternVL3_5-8B-HF

Every tensor keeps its bits, the 6B tower's q/k norms among them; configuration, tokenizer and processor files are
written for the other format. Several processes (torchrun -m megatron_v2pe convert-hf ...) share the work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", help="config.json, *.safetensors, tokenizer files")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--max-shard-size", default="", help="largest weight file, like 5GB (default)")
    add_format(parser, "the one that the source does not have")
    add_cast(parser)


def run(args: argparse.Namespace) -> int:
    """Convert; errors are raised as CheckpointError."""
    from megatron_v2pe.checkpoint.convert.other_format import convert_hf

    with shared_progress(NAME) as progress:
        written = convert_hf(
            args.source,
            args.target,
            to=args.format or None,
            force=args.force,
            dtype=args.dtype,
            max_shard_bytes=parse_size(args.max_shard_size) if args.max_shard_size else 0,
            progress=progress,
            expect=progress.expect,
        )
    if launcher().rank == 0:
        sys.stdout.write(f"{args.target}: converted to {written}\n")
    return 0
