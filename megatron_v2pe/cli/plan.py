"""`plan`: what a run needs and how long a step takes, without a cluster."""

from __future__ import annotations

import argparse
import sys

NAME = "plan"
HELP = """work out, on this machine, whether a run fits its GPUs, how long a step takes and what to change

This run:         megatron-v2pe plan run.yaml --gpus 32 --gpu-memory 80
Before import:    megatron-v2pe plan run.yaml --gpus 32 --arch 8B parallel.cp=8 model.recompute=full
Best layouts:     megatron-v2pe plan run.yaml --gpus 32 --arch 8B --search
1M evaluation:    megatron-v2pe plan run.yaml --gpus 8 --arch 2B --inference 1000000 parallel.cp=8

Weights, gradients and optimizer are exact; activations are what the modules allocate, operation by operation; times
follow from the stated rates of a GPU (--rate NAME=VALUE replaces one). Exit code 0: it fits, 1: it does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from megatron_v2pe.planning import arguments

    arguments.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from megatron_v2pe.planning.arguments import request
    from megatron_v2pe.planning.command import run_plan

    text, fits = run_plan(request(args))
    sys.stdout.write(text)
    return 0 if fits else 1
