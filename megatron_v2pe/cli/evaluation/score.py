"""`score`: answers in a folder again, or predictions that others recorded, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NAME = "score"
HELP = """score the answers of a benchmark again, from files alone.

O is a folder of `evaluate --benchmark NAME`, or predictions as the benchmark's own scripts record them (MM-NIAH:
TASK.jsonl files; MileBench: SET.jsonl files or SET/pred.json). Modes: `release` is the V2PE release's scorer,
`original` the benchmark's own, `clean` ours, in which an empty answer is never right and empty cells do not count.
Scores, table, cells and pictures go to --out (default: O, if `evaluate` made it; else they are only printed).

Example: megatron-v2pe score mm-niah predictions --mode original"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("benchmark", metavar="NAME", help="benchmark, as `evaluate --benchmark` names it")
    parser.add_argument("folder", metavar="O", help="folder of answers, or recorded predictions")
    parser.add_argument(
        "--mode", default="", help="release, original or clean; default: the benchmark's first"
    )
    parser.add_argument(
        "--letters", default="release", metavar="RULE", help="MileBench: release, single or fork"
    )
    parser.add_argument(
        "--duplicates",
        choices=("refuse", "keep", "drop"),
        default="refuse",
        help="recorded ids with two answers: an error (default), both count, or the last counts",
    )
    parser.add_argument("--out", default="", help="folder for scores.json, table.txt, cells.csv and pictures")
    parser.add_argument("--json", action="store_true", help="print scores.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Score; the table goes to stdout; exit code 1 where answers are missing or are errors."""
    from megatron_v2pe.evaluation.benchmarks.registry import find_benchmark
    from megatron_v2pe.evaluation.jobs import report
    from megatron_v2pe.evaluation.jobs.identity import MANIFEST
    from megatron_v2pe.evaluation.jobs.job import draw
    from megatron_v2pe.evaluation.jobs.pictures import write_pictures

    benchmark = find_benchmark(args.benchmark, letters=args.letters)
    mode = report.chosen_mode(benchmark, args.mode)
    folder = Path(args.folder)
    scores = report.score_folder(benchmark, folder, mode=mode, duplicates=args.duplicates)
    is_own = (folder / MANIFEST).exists()
    if args.out or is_own:
        report.write_report(Path(args.out or folder), benchmark, mode, scores)
    if is_own:
        draw(folder, benchmark, scores, out=Path(args.out or folder))
    elif args.out:
        write_pictures(Path(args.out), benchmark.title, scores, trained_length=0, tokens_per_tile=0)
    values = report.as_json(benchmark, mode, scores)
    text = json.dumps(values, indent=1) if args.json else report.table(benchmark, mode, scores)
    sys.stdout.write(text + "\n")
    for line in (found := report.problems(scores)):
        sys.stderr.write(f"megatron-v2pe: {line}\n")
    return 1 if found else 0
