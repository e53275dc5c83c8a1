"""Checkpoint -> Hugging Face InternVL2 folder, with the argument names of Megatron's converters.

    python tools/megatron_to_hf.py --load-dir checkpoints/internvl2-2b --save-dir InternVL2-2B-again
    python tools/megatron_to_hf.py --load-dir runs/first --save-dir InternVL2-2B-v2pe           (its newest checkpoint)
    python tools/megatron_to_hf.py --load-dir runs/first --iteration 400 --save-dir out --max-shard-size 5GB --check

The same as `megatron-v2pe export-hf`. It does not matter at which tensor, pipeline or data parallel size the checkpoint
was written: tensors are stored whole. Configuration, tokenizer and modelling code are those of the folder that was
imported, with the positions that were trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from convert_support.arguments import add_common_arguments, run_tool

LAYOUT = "a Hugging Face folder has no parallel layout, and the checkpoint is read from any"
FOREIGN = {
    "--target-tensor-parallel-size": LAYOUT,
    "--target-pipeline-parallel-size": LAYOUT,
    "--target-expert-parallel-size": LAYOUT,
    "--model-type": "the architecture is in the checkpoint",
    "--model-size": "the sizes are in the checkpoint",
    "--loader": "there is one format to read, and its layout does not matter",
    "--saver": "there is one format to write, safetensors",
    "--hf-model": "the checkpoint has the configuration, tokenizer and code of the folder it came from",
    "--tokenizer-model": "the checkpoint has its tokenizer",
    "--megatron-path": "megatron-core is an installed dependency",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tool."""
    add_common_arguments(parser, load="checkpoint folder, or a run's folder", save="Hugging Face")
    parser.add_argument(
        "--iteration", type=int, metavar="STEP", help="step of a run's folder (default: the newest)"
    )
    parser.add_argument(
        "--max-shard-size", default="", help="largest weight file, like 5GB (default: as imported)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare what was written with the checkpoint, bit by bit"
    )
    parser.add_argument(
        "--verify-checkpoint",
        choices=("sizes", "full"),
        default="sizes",
        help="check the checkpoint's files first: sizes, or all hashes (default: sizes)",
    )


def run(args: argparse.Namespace) -> int:
    """Find the checkpoint, convert, compare if asked to."""
    from megatron_v2pe.checkpoint.convert.export_hf import export_hf
    from megatron_v2pe.checkpoint.files.folder import read_info
    from megatron_v2pe.checkpoint.listing import find_checkpoint
    from megatron_v2pe.checkpoint.retention import step_path
    from megatron_v2pe.cli.arguments import parse_size, require_one_process, shared_progress
    from megatron_v2pe.core.env import launcher

    if args.check:
        require_one_process("megatron_to_hf --check")
    folder = (
        find_checkpoint(args.load_dir) if args.iteration is None else step_path(args.load_dir, args.iteration)
    )
    info = read_info(folder, verify=args.verify_checkpoint)
    max_shard_bytes = parse_size(args.max_shard_size) if args.max_shard_size else 0
    options = {"force": args.force, "max_shard_bytes": max_shard_bytes}
    with shared_progress("megatron_to_hf") as progress:
        export_hf(folder, args.save_dir, progress=progress, expect=progress.expect, **options)
    if launcher().rank == 0:
        print(f"{args.save_dir}: {info.family}, exported from {folder} (step {info.step})")
    return _check(folder, args.save_dir) if args.check else 0


def _check(folder: Path, hf_folder: str) -> int:
    from megatron_v2pe.checkpoint.hf.weight_files import INDEX_FILE
    from megatron_v2pe.verification.bits import verify

    report = verify(hf_folder, folder)
    report.side_files.pop(INDEX_FILE, None)  # of other shards, when --max-shard-size was given
    print("\n".join(report.lines()))
    return 0 if report.is_equal else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_tool(parser, run, argv, foreign=FOREIGN)


if __name__ == "__main__":
    sys.exit(main())
