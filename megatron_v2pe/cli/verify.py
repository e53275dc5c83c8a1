"""`verify`: does a checkpoint hold exactly what a Hugging Face folder holds, and does it compute the same?"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_v2pe.cli.conversion import add_verify_checkpoint
from megatron_v2pe.cli.numerics_arguments import add_numerics_arguments, refuse_without_numerics
from megatron_v2pe.cli.numerics_run import run_numerics
from megatron_v2pe.cli.progress import byte_progress

NAME = "verify"
HELP = """compare a checkpoint with a Hugging Face folder, tensor by tensor and bit by bit

Example:  megatron-v2pe verify InternVL2-2B checkpoints/internvl2-2b
          torchrun --nproc-per-node 2 -m megatron_v2pe verify InternVL2-2B checkpoints/internvl2-2b --numerics --tp 2

Every tensor of both sides is accounted for. The SHA-256 is taken over names, dtypes, shapes and bytes of all tensors;
a folder, its import and what that exports to have the same one. Exit code 0: equal, 1: not, 2: cannot be compared.

With --numerics both are run instead: random words and tiles go through a plain PyTorch model made of the folder's
tensors (float64; the folder may also be another checkpoint) and through the checkpoint in this package's model, at any
--tp --pp --cp. A table shows the error of each stage; exit code 1 if one is beyond its limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="Hugging Face folder")
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="the whole report as json instead of text")
    add_verify_checkpoint(parser)
    add_numerics_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when equal, 1 when not."""
    if args.numerics:
        return run_numerics(args)
    refuse_without_numerics(args)
    from megatron_v2pe.verification.bits import verify

    with byte_progress(NAME) as progress:
        report = verify(args.hf_folder, args.checkpoint, files=args.verify_checkpoint, progress=progress)
    text = json.dumps(report.to_json(), indent=2) if args.json else "\n".join(report.lines())
    sys.stdout.write(text + "\n")
    return 0 if report.is_equal else 1
