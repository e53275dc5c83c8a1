"""The options of `verify --numerics`."""

from __future__ import annotations

import argparse

from megatron_v2pe.cli.parallel_arguments import add_parallel_arguments
from megatron_v2pe.core.errors import ConfigError

_DEFAULTS = {
    "tp": 1,
    "pp": 1,
    "cp": 1,
    "sp": False,
    "split_tower": False,
    "dtype": "float32",
    "stride": 0,
    "every": 0,
    "reference": "plain",
}


def add_numerics_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `--numerics` and what only it reads."""
    parser.add_argument(
        "--numerics", action="store_true", help="compare what they compute, not their bits; also:"
    )
    add_parallel_arguments(parser)
    parser.add_argument("--sp", action="store_true", help="sequence parallelism (needs --tp 2 or more)")
    parser.add_argument("--split-tower", action="store_true", help="split the vision tower over tp")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype (default float32)"
    )
    parser.add_argument(
        "--stride", type=int, default=0, help="V2PE stride; 0 (default) is ordinary positions"
    )
    parser.add_argument(
        "--every", type=int, default=0, help="show each k-th layer (default: about 8 of a part)"
    )
    parser.add_argument(
        "--reference",
        choices=("plain", "transformers"),
        default="plain",
        help="judge: plain PyTorch (default), or with transformers' decoder (needs the extra 'verify')",
    )


def refuse_without_numerics(args: argparse.Namespace) -> None:
    """Options that a comparison of bits would ignore.

    Raises:
        ConfigError: one of them was given.
    """
    given = [name for name, default in _DEFAULTS.items() if getattr(args, name) != default]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        verb = "means" if len(given) == 1 else "mean"
        raise ConfigError(f"verify: {flags} only {verb} something with --numerics; add it, or leave them out")
