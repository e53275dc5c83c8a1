"""`verify`: does a checkpoint hold exactly what a Hugging Face folder holds?"""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.conversion import byte_progress

NAME = "verify"
HELP = """compare a checkpoint with a Hugging Face folder, tensor by tensor and bit by bit; exit code 1 if they differ

Example:  megatron-v2pe verify InternVL2-2B checkpoints/internvl2-2b"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="Hugging Face folder")
    parser.add_argument("checkpoint", help="checkpoint folder")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when equal, 1 when not."""
    from megatron_v2pe.checkpoint.verify import verify

    with byte_progress(NAME) as progress:
        report = verify(args.hf_folder, args.checkpoint, progress=progress)
    sys.stdout.write("\n".join(report.lines()) + "\n")
    return 0 if report.is_equal else 1
