"""`paper-table`: the paper's and the model card's numbers beside ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

NAME = "paper-table"
HELP = """print the tables of the paper and of the model card with our numbers in them, in percent.

Each O is a folder that `evaluate --benchmark` or `score --out` has written. Our settings are said in words, and for
each number that cannot be matched exactly, why. With --out, table.txt and a picture of bars are written there.

Example: megatron-v2pe paper-table eval/niah eval/milebench eval/chartqa --out eval/table"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folders", metavar="O", nargs="+", help="folders with scores.json")
    parser.add_argument("--out", default="", help="folder for paper_table.txt and against_the_card.png")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from megatron_v2pe.core.files import writable_folder, write_atomic
    from megatron_v2pe.evaluation.jobs.pictures import write_card_bars
    from megatron_v2pe.evaluation.paper.table import card_bars, paper_table

    folders = [Path(name) for name in args.folders]
    text = paper_table(folders)
    sys.stdout.write(text + "\n")
    if args.out:
        out = writable_folder(args.out, field="--out")
        write_atomic(out / "paper_table.txt", text + "\n")
        ours, card = card_bars(folders)
        if ours:
            write_card_bars(out / "against_the_card.png", ours, card)
    return 0
