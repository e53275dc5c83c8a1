"""`check-data`: what of the published benchmarks is in a folder, and what to download."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

NAME = "check-data"
HELP = """look for the files of published benchmarks in a folder: what is there, how many questions against the
published number, and what to download and where it goes.

Every record is read, every image and video looked for; a wrong one is named by file, line and key. Without --benchmark
all are looked for, each in D/NAME and in D.

Exit code 1 where a file that is there has a problem, or where a benchmark that was named has no file.

Example: megatron-v2pe check-data data/benchmarks --benchmark mm-niah"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="D", help="folder of benchmark data")
    parser.add_argument(
        "--benchmark", action="append", default=[], metavar="NAME", help="only this; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Print one block a benchmark."""
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.evaluation.benchmarks.registry import BENCHMARKS, find_benchmark
    from megatron_v2pe.evaluation.jobs.data_check import check_text

    root = Path(args.folder)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    has_problem = False
    for name in args.benchmark or BENCHMARKS:
        benchmark = find_benchmark(name)
        text, is_fine = check_text(benchmark, root, is_required=bool(args.benchmark))
        has_problem = has_problem or not is_fine
        sys.stdout.write(text + "\n")
    return 1 if has_problem else 0
