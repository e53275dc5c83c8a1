"""PEFT folders in and out, for `import-hf --base` and `export-hf --adapter`."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.conversion import check_files, refuse_ranks
from megatron_v2pe.core.errors import ConfigError


def import_adapters(args: argparse.Namespace) -> int:
    """Make a checkpoint of a PEFT folder; errors are raised as CheckpointError or ConfigError."""
    from megatron_v2pe.checkpoint.adapters.peft_import import import_peft

    refuse_ranks("import-hf --base")
    if args.dtype != "keep" or args.allow_pickle:
        raise ConfigError(
            "--dtype and --allow-pickle are for whole models; adapters (--base) come as they are"
        )
    import_peft(args.hf_folder, args.checkpoint, base=args.base, force=args.force)
    sys.stdout.write(f"{args.checkpoint}: adapters of {args.base}\n")
    return 0


def export_adapters(args: argparse.Namespace) -> int:
    """Write a PEFT folder; errors are raised as CheckpointError or ConfigError."""
    from megatron_v2pe.checkpoint.adapters.peft_export import export_peft

    refuse_ranks("export-hf --adapter")
    if args.dtype != "keep":
        raise ConfigError(
            "--dtype is for whole models; adapters (--adapter) keep the dtype that they were trained in"
        )
    if args.max_shard_size:
        raise ConfigError("--max-shard-size is for whole models; a PEFT folder (--adapter) has one file")
    check_files(args)
    count = export_peft(args.checkpoint, args.hf_folder, force=args.force)
    sys.stdout.write(f"{args.hf_folder}: {count} tensors for PEFT\n")
    return 0
