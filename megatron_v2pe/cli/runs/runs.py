"""`runs`: what happened in one run, or in two side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_v2pe.core.errors import DataError

NAME = "runs"
HELP = """what happened in a run: losses, speed, stalls, steps not applied, hangs, checkpoints

One run:        megatron-v2pe runs RUN_DIR
Two of them:    megatron-v2pe runs RUN_DIR OTHER          # also says where their losses differ
With curves:    megatron-v2pe runs RUN_DIR --out curves.png

A stall is a step that took more than three times the median. Each hang is one line:
which ranks waited in which call, and which did not; RUN_DIR/stacks/rank_N.txt has the whole stacks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_dir", help="runtime.run_dir of a training run")
    parser.add_argument("other", nargs="?", help="a second one, to compare with")
    parser.add_argument(
        "--out",
        metavar="PNG",
        help="draw losses, also by data set, norms, speed, waits, memory over the steps",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, draw when asked."""
    from megatron_v2pe.inspection.run_curves import draw_curves
    from megatron_v2pe.inspection.run_table import runs_table
    from megatron_v2pe.inspection.runs import read_run

    runs = [read_run(path) for path in (args.run_dir, args.other) if path]
    if args.out:
        if Path(args.out).suffix != ".png":
            raise DataError(f"--out is {args.out!r}, but must end in .png")
        try:
            draw_curves(runs, Path(args.out))
        except OSError as error:
            raise DataError(f"--out is {args.out!r}, which cannot be written ({error.strerror})") from None
    sys.stdout.write(runs_table(runs))
    return 0
