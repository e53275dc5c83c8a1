"""`import-hf`: a Hugging Face InternVL2 folder becomes a checkpoint folder."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.conversion import add_dtype
from megatron_v2pe.cli.peft_folders import import_adapters
from megatron_v2pe.cli.progress import shared_progress
from megatron_v2pe.core.env import launcher

NAME = "import-hf"
HELP = """turn a Hugging Face InternVL2 folder into a checkpoint that train and generate read

Example:  megatron-v2pe import-hf InternVL2-2B checkpoints/internvl2-2b

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
    add_dtype(parser)
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read *.bin where there are no safetensors, with torch's weights_only: tensors, no code",
    )


def run(args: argparse.Namespace) -> int:
    """Import; errors are raised as CheckpointError."""
    if args.base:
        return import_adapters(args)
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
