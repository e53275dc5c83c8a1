"""`import-hf`: a Hugging Face InternVL2 folder, or a PEFT folder, becomes a checkpoint folder."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import add_cast, require_one_process, shared_progress
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError

NAME = "import-hf"
HELP = """turn a Hugging Face InternVL2 folder into a checkpoint that train and generate read

A model:    megatron-v2pe import-hf InternVL2-2B checkpoints/internvl2-2b
Adapters:   megatron-v2pe import-hf my-lora checkpoints/my-lora --base checkpoints/internvl2-2b

The checkpoint suits every parallel layout. Several processes (torchrun -m megatron_v2pe import-hf ...) write the same
bytes as one. With --base CHECKPOINT the folder is one of PEFT adapters, which become a checkpoint on that base."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="config.json, *.safetensors, tokenizer files")
    parser.add_argument("checkpoint", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint folder if it exists")
    parser.add_argument(
        "--base", default="", metavar="CHECKPOINT", help="hf_folder is a PEFT folder of this model"
    )
    add_cast(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read *.bin where there are no safetensors, with torch's weights_only: tensors, no code",
    )


def run(args: argparse.Namespace) -> int:
    """Import; errors are raised as CheckpointError or ConfigError."""
    return _import_adapters(args) if args.base else _import_model(args)


def _import_model(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.convert.import_hf import import_hf

    with shared_progress(NAME) as progress:
        info = import_hf(
            args.hf_folder,
            args.checkpoint,
            force=args.force,
            dtype=args.dtype,
            allow_pickle=args.allow_pickle,
            progress=progress,
            expect=progress.expect,
        )
    if launcher().rank == 0:
        sys.stdout.write(f"{args.checkpoint}: {info.family}, {info.num_parameters:,} parameters\n")
    return 0


def _import_adapters(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.adapters.peft_import import import_peft

    require_one_process("import-hf --base")
    if args.dtype != "keep" or args.allow_pickle:
        raise ConfigError(
            "--dtype and --allow-pickle are for whole models; adapters (--base) come as they are"
        )
    import_peft(args.hf_folder, args.checkpoint, base=args.base, force=args.force)
    sys.stdout.write(f"{args.checkpoint}: adapters of {args.base}\n")
    return 0
