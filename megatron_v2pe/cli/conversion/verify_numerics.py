"""`verify-numerics`: does a checkpoint compute, in this package's model, what its source computes in plain PyTorch?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Literal

from megatron_v2pe.cli.arguments import (
    add_parallel_sizes,
    add_verify_checkpoint,
    check_files,
    parallel_config,
)

NAME = "verify-numerics"
HELP = """run a checkpoint and its source on one input and compare every stage of the forward pass

One rank:    megatron-v2pe verify-numerics InternVL2-2B checkpoints/internvl2-2b
Two ranks:   torchrun --nproc-per-node 2 -m megatron_v2pe verify-numerics InternVL2-2B checkpoints/internvl2-2b --tp 2

Random token ids and tiles go through a plain PyTorch model made of the folder's tensors (float64; the folder may also
be another checkpoint) and through the checkpoint in this package's model, at any --tp --pp --cp. A table shows the
error of each stage. Exit code 0: all are within their limits, 1: one is not, 2: cannot be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="Hugging Face folder, or another checkpoint")
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="the whole table as json instead of text")
    add_parallel_sizes(parser)
    parser.add_argument("--sp", action="store_true", help="sequence parallelism (needs --tp 2 or more)")
    parser.add_argument("--split-tower", action="store_true", help="split the vision tower over tp")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype (default float32)"
    )
    parser.add_argument(
        "--stride", type=int, default=0, help="V2PE stride; 0 (default) is ordinary positions"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=0,
        metavar="K",
        help="show each K-th layer (default: about 8 of the tower and 8 of the decoder)",
    )
    parser.add_argument(
        "--reference",
        choices=("plain", "transformers"),
        default="plain",
        help="judge: plain PyTorch (default), or with transformers' decoder (needs the extra 'verify')",
    )
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 when every stage is within its limit, 1 when not."""
    from megatron_v2pe.parallel.topology import shutdown
    from megatron_v2pe.verification.numerics.compare import compare_numerics, format_rows, to_json

    vision: Literal["tensor", "replicated"] = "tensor" if args.split_tower else "replicated"
    parallel = dataclasses.replace(parallel_config(args), sequence_parallel=args.sp, vision=vision)
    here = check_files(args)
    rows = compare_numerics(
        args.hf_folder,
        args.checkpoint,
        parallel=parallel,
        world_size=here.world_size,
        dtype=args.dtype,
        stride=args.stride,
        every=args.every,
        reference=args.reference,
    )
    if here.rank == 0:
        sys.stdout.write((json.dumps(to_json(rows), indent=2) if args.json else format_rows(rows)) + "\n")
    shutdown()
    return 0 if all(row.passes for row in rows) else 1
