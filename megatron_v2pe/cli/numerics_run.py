"""What `verify --numerics` runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Literal

from megatron_v2pe.cli.conversion import check_files
from megatron_v2pe.cli.parallel_arguments import parallel_config


def run_numerics(args: argparse.Namespace) -> int:
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
