"""`preflight`: what would stop or slow a run on these machines, found in a minute."""

from __future__ import annotations

import argparse
import math
import sys

from megatron_v2pe.cli.arguments import add_run_config, run_config
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError

NAME = "preflight"
HELP = """check everything that a run needs on these very machines, in under a minute

Here:             megatron-v2pe preflight run.yaml
Two ranks:        torchrun --standalone --nproc-per-node 2 -m megatron_v2pe preflight run.yaml parallel.cp=2
On the cluster:   python launch/submit.py CLUSTER.yaml --nodes 4 preflight run.yaml

Devices and free memory, versions, clocks, rates of all-reduce and send/recv, run folder (written, flushed, renamed,
seen by all ranks), free space against the checkpoints' size, data list and images of a few samples, the job's time
limit against the planned steps, and the run's attention against float64. Exit code 0: go, 1: no-go, 2: a mistake."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_run_config(parser)
    parser.add_argument(
        "--free-gb",
        type=float,
        default=0.0,
        help="GB that must stay free beside the checkpoints (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table on rank 0."""
    if not (args.free_gb >= 0 and math.isfinite(args.free_gb)):
        raise ConfigError(f"--free-gb is {args.free_gb}, but must be a number of GB, 0 or more")
    config = run_config(args.config, args.overrides)

    from megatron_v2pe.preflight.run import preflight

    text, is_go = preflight(config, free_gb=args.free_gb)
    if launcher().rank == 0:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0 if is_go else 1
