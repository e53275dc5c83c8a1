"""`show-sample`: one packed sample as a picture and a list."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import add_data_source, data_config, tokenizer_folder

NAME = "show-sample"
HELP = """draw what one micro batch of a run trains on, and list its texts and images on stdout

    megatron-v2pe show-sample run.yaml --step 1 --micro-batch 0 --cp 4 --out shown

The picture has the kind and the owner rank of every token, its position, the text (supervised text on orange) and the
images as the model sees them. Steps count from 1 as in metrics.jsonl; --micro-batch counts the packs of the step over
all data parallel ranks from 0. Lengths are measured first where the run has not done so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_data_source(parser)
    parser.add_argument("--step", type=int, default=1, help="step, from 1 (default: 1)")
    parser.add_argument("--micro-batch", type=int, default=0, help="pack of the step, from 0 (default: 0)")
    parser.add_argument("--cp", type=int, help="context parallel ranks (default: parallel.cp)")
    parser.add_argument("--out", metavar="DIR", help="folder for the picture; only the list without it")


def run(args: argparse.Namespace) -> int:
    """Draw; the list goes to stdout, then the picture's path."""
    config = data_config(args)

    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.core.files import writable_folder
    from megatron_v2pe.inspection.sample_picture import write_picture
    from megatron_v2pe.inspection.sample_view import listing, view_pack

    cp = config.parallel.cp if args.cp is None else args.cp
    if cp < 1:
        raise ConfigError(f"--cp is {cp}, but must be at least 1")
    out = None if args.out is None else writable_folder(args.out, field="--out")
    folder = tokenizer_folder(config)
    view = view_pack(
        config,
        read_architecture(folder),
        folder,
        step=args.step,
        micro_batch=args.micro_batch,
        cp=cp,
    )
    sys.stdout.write(listing(view))
    if out is not None:
        path = out / f"step{args.step}_micro_batch{args.micro_batch}.png"
        write_picture(path, view)
        sys.stdout.write(f"{path}\n")
    return 0
