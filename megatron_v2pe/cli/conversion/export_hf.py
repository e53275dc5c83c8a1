"""`export-hf`: a checkpoint folder becomes a Hugging Face folder, or its adapters a PEFT folder."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import (
    add_cast,
    add_format,
    add_verify_checkpoint,
    check_files,
    parse_size,
    require_one_process,
    shared_progress,
)
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError

NAME = "export-hf"
HELP = """write a checkpoint's weights, configuration and tokenizer as a Hugging Face folder

A model:    megatron-v2pe export-hf run/checkpoints/step_00001000 InternVL2-2B-v2pe --max-shard-size 5GB
Adapters:   megatron-v2pe export-hf run/checkpoints/step_00001000 my-lora --adapter

Adapters (a run with lora.*) are merged into their base, W + alpha / rank * B A. With --adapter they are written alone,
as a folder that PEFT loads onto the Hugging Face model of the base."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="folder written by import-hf, or a step folder of a run")
    parser.add_argument("hf_folder", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--adapter", action="store_true", help="write the adapters alone, as a PEFT folder")
    parser.add_argument(
        "--max-shard-size",
        default="",
        metavar="SIZE",
        help="largest weight file, like 5GB; default: files as they were imported",
    )
    add_format(parser, "that of the folder which was imported")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="stride to recommend in config.json, for a checkpoint that was trained with random ones",
    )
    parser.add_argument(
        "--remote-code",
        action="store_true",
        help="put code beside the weights, so that transformers (trust_remote_code=True) answers with V2PE positions",
    )
    parser.add_argument(
        "--drop-expert-bias",
        action="store_true",
        help="leave out the bias by which moe.bias_rate balanced the experts; no format has a place for it",
    )
    add_cast(parser)
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Export; errors are raised as CheckpointError or ConfigError."""
    return _export_adapters(args) if args.adapter else _export_model(args)


def _export_model(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.convert.export_hf import export_hf

    max_shard_bytes = parse_size(args.max_shard_size) if args.max_shard_size else 0
    with shared_progress(NAME) as progress:
        check_files(args)
        export_hf(
            args.checkpoint,
            args.hf_folder,
            force=args.force,
            dtype=args.dtype,
            max_shard_bytes=max_shard_bytes,
            to=args.format or None,
            stride=args.stride,
            remote_code=args.remote_code,
            drop_expert_bias=args.drop_expert_bias,
            progress=progress,
            expect=progress.expect,
        )
    if launcher().rank == 0:
        sys.stdout.write(f"{args.hf_folder}: exported\n")
    return 0


def _export_adapters(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.adapters.peft_export import export_peft
    from megatron_v2pe.checkpoint.convert.export_hf import check_expert_bias

    require_one_process("export-hf --adapter")
    if args.remote_code or args.stride is not None:
        raise ConfigError(
            "--adapter writes adapters alone, without config.json; omit --remote-code and --stride"
        )
    if args.dtype != "keep":
        raise ConfigError(
            "--dtype is for whole models; adapters (--adapter) keep the dtype that they were trained in"
        )
    if args.max_shard_size:
        raise ConfigError("--max-shard-size is for whole models; a PEFT folder (--adapter) has one file")
    check_files(args)
    check_expert_bias(args.checkpoint, is_dropped=args.drop_expert_bias)
    count = export_peft(args.checkpoint, args.hf_folder, force=args.force)
    sys.stdout.write(f"{args.hf_folder}: {count} tensors for PEFT\n")
    return 0
