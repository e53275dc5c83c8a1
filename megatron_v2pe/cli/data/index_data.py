"""`index-data`: measure a run's data once, and show what it holds."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_v2pe.cli.arguments import add_data_source, data_config, tokenizer_folder

NAME = "index-data"
HELP = """measure tokens, tiles and supervised tokens of every sample, from text and image headers

A run:        megatron-v2pe index-data run.yaml --report report
Any data:     megatron-v2pe index-data --meta data.json --checkpoint InternVL2-2B --cache-dir cache
                  data.max_sample_tokens=32768 data.max_pack_tokens=32768

`train` reads the same cache (data.cache_dir, else RUN_DIR/data_cache) and measures with one process what is not in it.
An interrupted pass continues where it was; of a file that grew only new lines are measured. Bad lines are named with
file and line. --report writes tables, packs.csv and pictures of lengths, tiles, sources, packs and imbalance."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_source(parser)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    parser.add_argument("--report", metavar="OUT", help="folder for tables and pictures")


def run(args: argparse.Namespace) -> int:
    """Measure; the table goes to stdout, bad lines to stderr."""
    config = data_config(args)

    from megatron_v2pe.inspection.data_report import overview

    result = overview(
        config, tokenizer_folder(config), workers=args.workers, report_dir=args.report, show_progress=True
    )
    sys.stdout.write(result.text)
    sys.stderr.write(result.bad_text)
    if result.problem is not None:
        raise result.problem
    return 0
