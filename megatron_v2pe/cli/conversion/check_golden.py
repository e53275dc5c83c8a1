"""`check-golden`: this package against recorded cases of the V2PE release."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from megatron_v2pe.cli.arguments import add_parallel_sizes, parallel_config

NAME = "check-golden"
HELP = """run every case of a golden folder through this package and print one line per case and quantity:
name, quantity, max abs error, tolerance, status. The last line has the counts.
Exit code: 0 all passed, 1 a case failed, 2 none failed but some could not be run.

With --tp, --pp, --cp, --ep or --sp the model's cases (forward, loss, gradients, generation) run on that many local
ranks, which this command starts itself unless it runs under torchrun already. With --ep only checkpoints with experts
run, and data parallel ranks, which repeat the case, are added until the experts have ranks to lie on.

Example: megatron-v2pe check-golden tests/golden --group model --tp 2 --cp 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder in the golden format")
    add_parallel_sizes(parser)
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallel size")
    parser.add_argument("--etp", type=int, default=0, metavar="N", help="ranks that split each expert")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism (needs --tp 2 or more)")
    parser.add_argument("--group", help="run one group of cases only")
    parser.add_argument("--family", help="run checkpoints whose key starts with this only")


def run(args: argparse.Namespace) -> int:
    """Run the cases; see HELP for the exit code."""
    from megatron_v2pe.config.schema import ParallelConfig
    from megatron_v2pe.core.env import launcher
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.verification.golden.checkpoints import require_fit
    from megatron_v2pe.verification.golden.ranks import run_on_local_ranks
    from megatron_v2pe.verification.golden.rows import exit_code, format_counts, format_row
    from megatron_v2pe.verification.golden.runner import check_family, run_groups, select_groups

    parallel = replace(parallel_config(args), ep=args.ep, etp=args.etp, sequence_parallel=args.sp)
    here = launcher()
    is_parallel = parallel != ParallelConfig()
    groups = select_groups(args.folder, name=args.group, model_only=is_parallel or here.world_size > 1)
    check_family(args.folder, args.family)
    if is_parallel:
        require_fit(args.folder, family=args.family, parallel=parallel)
    if is_parallel and here.world_size == 1:
        rows = run_on_local_ranks(args.folder, groups, family=args.family, parallel=parallel)
    else:
        rows = []
        plan = parallel if here.world_size > 1 else None
        for row in run_groups(args.folder, groups, family=args.family, parallel=plan):
            rows.append(row)
            if here.rank == 0:
                sys.stdout.write(format_row(row) + "\n")
                sys.stdout.flush()
    if not rows:
        raise ConfigError(_nothing_ran(args))
    if here.rank == 0:
        sys.stdout.write(format_counts(rows) + "\n")
    return exit_code(rows)


def _nothing_ran(args: argparse.Namespace) -> str:
    """Why no case ran, which is no success."""
    asked = " ".join(f"--{key} {value}" for key in ("group", "family") if (value := getattr(args, key)))
    experts = "; with --ep only checkpoints with experts run" if args.ep > 1 else ""
    return f"check-golden: no case of {args.folder} was run with {asked or 'these options'}{experts}"
