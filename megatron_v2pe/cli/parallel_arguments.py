"""`--tp`, `--pp` and `--cp` of the verbs that run a model without a run's YAML file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_v2pe.config.schema import ParallelConfig


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sizes; 1 each by default."""
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
        parser.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{what} parallel size (default 1)"
        )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The sizes as configuration.

    Raises:
        ConfigError: a size is below 1.
    """
    from megatron_v2pe.config.schema import ParallelConfig
    from megatron_v2pe.core.errors import ConfigError

    for name in ("tp", "pp", "cp"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    return ParallelConfig(tp=args.tp, pp=args.pp, cp=args.cp)
