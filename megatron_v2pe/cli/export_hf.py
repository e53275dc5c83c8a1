"""`export-hf`: a checkpoint folder becomes a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.conversion import add_verify_checkpoint, byte_progress, check_files
from megatron_v2pe.core.errors import ConfigError

NAME = "export-hf"
HELP = """write a checkpoint's weights, configuration and tokenizer as a Hugging Face folder

Example:  megatron-v2pe export-hf run/checkpoints/step_00001000 InternVL2-2B-v2pe --max-shard-size 5GB"""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="folder written by import-hf, or a step folder of a run")
    parser.add_argument("hf_folder", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--max-shard-size",
        default="",
        help="largest weight file, like 5GB; default: files as they were imported",
    )
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Export; errors are raised as CheckpointError or ConfigError."""
    max_shard_bytes = parse_size(args.max_shard_size) if args.max_shard_size else 0
    from megatron_v2pe.checkpoint.convert import export_hf

    with byte_progress(NAME) as progress:
        check_files(args)
        export_hf(
            args.checkpoint,
            args.hf_folder,
            force=args.force,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    sys.stdout.write(f"{args.hf_folder}: exported\n")
    return 0


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500MiB"."""
    unit = text.lstrip("0123456789")
    digits = text.removesuffix(unit)
    if unit not in _UNITS or not digits or int(digits) == 0:
        raise ConfigError(
            f"--max-shard-size is {text!r}, must be a whole number and one of {', '.join(_UNITS)}"
        )
    return int(digits) * _UNITS[unit]
