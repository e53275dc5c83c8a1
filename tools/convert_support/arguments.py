"""What the conversion tools share: Megatron's argument names, why some of them have no use here, one way to fail."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError, V2PEError


def add_common_arguments(parser: argparse.ArgumentParser, *, load: str, save: str) -> None:
    """Add `--load-dir`, `--save-dir` and `--force`."""
    parser.add_argument("--load-dir", required=True, metavar="DIR", help=load)
    parser.add_argument("--save-dir", required=True, metavar="DIR", help=f"{save} folder to create")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def target_layout(hf_folder: str, *, tp: int, pp: int, vpp: int) -> dict[str, int]:
    """The parallel sizes that differ from 1, checked against the model's sizes.

    Raises:
        ConfigError: a size does not divide what it has to divide; the message lists sizes that do.
        CheckpointError: the folder's config.json cannot be used.
    """
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.validate import check_model_split, check_pipeline

    arch = read_architecture(hf_folder)
    try:
        parallel = ParallelConfig(tp=tp, pp=pp, vpp=vpp)
        check_model_split(parallel, arch)
        check_pipeline(parallel, arch.language.num_layers)
    except ConfigError as error:
        flags = "--target-tensor-, -pipeline- and -virtual-pipeline-parallel-size are parallel.tp, pp and vpp"
        raise ConfigError(f"{hf_folder}: {error}\n  ({flags})") from None
    return {name: size for name, size in (("tp", tp), ("pp", pp), ("vpp", vpp)) if size > 1}


def run_tool(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    *,
    foreign: Mapping[str, str] | None = None,
) -> int:
    """Parse and run; mistakes are one message and exit code 2, as with `megatron-v2pe`.

    Args:
        parser: the tool's arguments.
        run: the tool; returns an exit code.
        argv: arguments, the process's own when None.
        foreign: flags of other converters -> why this one has no use for them. They are refused, never ignored.
    """
    from megatron_v2pe.core.env import launcher
    from megatron_v2pe.core.logging import quiet_dependencies, setup_logging

    try:
        setup_logging(launcher().rank)
        quiet_dependencies()
        _refuse(list(sys.argv[1:] if argv is None else argv), foreign or {})
        return run(parser.parse_args(argv))
    except V2PEError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1


def _refuse(arguments: Sequence[str], foreign: Mapping[str, str]) -> None:
    given = [text.partition("=")[0] for text in arguments]
    refused = [f"{flag} has no use here: {foreign[flag]}" for flag in dict.fromkeys(given) if flag in foreign]
    if refused:
        raise ConfigError("\n  ".join([*refused, "omit it" if len(refused) == 1 else "omit them"]))
