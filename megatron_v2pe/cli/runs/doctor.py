"""`doctor`: what this machine has and what will therefore be used."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.core.text_table import text_table

NAME = "doctor"
HELP = """report what was found on this machine (torch, CUDA, NCCL, Transformer Engine, apex, megatron-core, SLURM,
cores, memory) and what will therefore be used (runtime, attention, optimizer). Always exits with 0.

Example: megatron-v2pe doctor"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from megatron_v2pe.assembly.environment import describe_choices, describe_environment

    for title, lines in (("found", describe_environment()), ("will use", describe_choices())):
        sys.stdout.write(f"{title}\n")
        for line in text_table(None, lines, align="<", indent="  "):
            sys.stdout.write(f"{line}\n")
    return 0
