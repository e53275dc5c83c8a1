"""`export-hf`: a checkpoint folder becomes a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.conversion import add_dtype, add_verify_checkpoint, check_files
from megatron_v2pe.cli.peft_folders import export_adapters
from megatron_v2pe.cli.progress import shared_progress
from megatron_v2pe.cli.sizes import parse_size
from megatron_v2pe.core.env import launcher

NAME = "export-hf"
HELP = """write a checkpoint's weights, configuration and tokenizer as a Hugging Face folder

Example:  megatron-v2pe export-hf run/checkpoints/step_00001000 InternVL2-2B-v2pe --max-shard-size 5GB

Adapters (a run with lora.*) are merged into their base, W + alpha / rank * B A. With --adapter they are written alone,
as a folder that PEFT loads onto the Hugging Face model of the base."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="folder written by import-hf, or a step folder of a run")
    parser.add_argument("hf_folder", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--adapter", action="store_true", help="write the adapters alone, as a PEFT folder")
    parser.add_argument(
        "--max-shard-size",
        default="",
        help="largest weight file, like 5GB; default: files as they were imported",
    )
    add_dtype(parser)
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Export; errors are raised as CheckpointError or ConfigError."""
    if args.adapter:
        return export_adapters(args)
    from megatron_v2pe.checkpoint.convert.export_hf import export_hf

    max_shard_bytes = parse_size(args.max_shard_size) if args.max_shard_size else 0
    options = {"force": args.force, "dtype": args.dtype, "max_shard_bytes": max_shard_bytes}
    with shared_progress(NAME) as progress:
        check_files(args)
        export_hf(args.checkpoint, args.hf_folder, progress=progress, expect=progress.expect, **options)
    if launcher().rank == 0:
        sys.stdout.write(f"{args.hf_folder}: exported\n")
    return 0
