"""`evaluate`: retrieval over lengths, depths and strides, with tables and pictures."""

from __future__ import annotations

import argparse
import sys

from megatron_v2pe.cli.arguments import (
    add_parallel_sizes,
    add_verify_checkpoint,
    check_files,
    parallel_config,
)
from megatron_v2pe.core.errors import ConfigError

NAME = "evaluate"
HELP = """ask about long documents, once per stride; report exact-match accuracy by length and depth.

DATA is a jsonl file (images are looked up beside it) or a meta json, whose limits of tiles and frames come first. A
record is a conversation that ends with the expected answer, with id, length (tokens) and depth (0..1). A video shows
its middle frames. A stopped run continues. Under torchrun, processes or groups of --tp, --pp, --cp share the questions.

Example: megatron-v2pe evaluate runs/a/checkpoints/step_00000400 --data eval.jsonl --strides default,1,2 --out eval"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help="folder written by import-hf, or a step folder of a run")
    parser.add_argument("--data", required=True, help="questions: a .jsonl file or a meta .json")
    parser.add_argument("--strides", default="default", help="comma list of 'default' and position units")
    parser.add_argument("--out", required=True, help="folder for predictions, tables and pictures")
    parser.add_argument("--metrics", default="", help="metrics.jsonl of the run, for a loss curve")
    add_parallel_sizes(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="longest answer")
    parser.add_argument("--max-dynamic-patch", type=int, default=12, metavar="N", help="most tiles per image")
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate; the table goes to stdout."""
    from megatron_v2pe.config.schema import DataConfig
    from megatron_v2pe.evaluation.answerer import EngineAnswerer
    from megatron_v2pe.evaluation.retrieval import parse_strides, read_items
    from megatron_v2pe.evaluation.runner import (
        claim_folder,
        describe_subject,
        run_strides,
        write_evaluation,
    )
    from megatron_v2pe.inspection.figures import pyplot

    pyplot()  # a missing matplotlib is reported before the work
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    here = check_files(args)
    answerer = EngineAnswerer(
        args.checkpoint,
        data=DataConfig(max_dynamic_patch=args.max_dynamic_patch),
        parallel=parallel_config(args),
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
    )
    settings = parse_strides(args.strides, tokens_per_tile=answerer.arch.tokens_per_tile)
    items = read_items(args.data)
    options = f"{args.dtype}, {args.max_new_tokens} new tokens, {args.max_dynamic_patch} tiles"
    subject = describe_subject(args.checkpoint, args.data, options=options)
    folder = claim_folder(args.out, subject, is_writer=here.rank == 0)
    scores = run_strides(items, settings=settings, answerer=answerer, folder=folder)
    if here.rank == 0:
        text = write_evaluation(scores, folder=folder, arch=answerer.arch, metrics_path=args.metrics)
        sys.stdout.write(text + "\n")
    return 0
