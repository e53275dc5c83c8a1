"""Hugging Face InternVL2 folder -> checkpoint for training, with the argument names of Megatron's converters.

    python tools/hf_to_megatron.py --load-dir InternVL2-2B --save-dir checkpoints/internvl2-2b
    python tools/hf_to_megatron.py --load-dir InternVL2-2B --save-dir checkpoints/internvl2-2b --bf16
                                   --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2

The same as `megatron-v2pe import-hf`. The checkpoint is one for every layout: tensors are stored whole, and each rank
of a run reads the slices that it needs. So the target sizes change no tensor of it. They are checked against the model
(do they divide heads, KV heads, channels, layers?), noted in checkpoint.json, and printed as overrides for `train`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convert_support.arguments import add_common_arguments, run_tool, target_layout

FOREIGN = {
    "--model-type": "the architecture is read from config.json",
    "--model-size": "the sizes are read from config.json",
    "--loader": "there is one format to read, a Hugging Face folder",
    "--saver": "there is one format to write, and train reads it at any layout",
    "--checkpoint-type": "the source is always a Hugging Face folder",
    "--tokenizer-model": "the folder's own tokenizer files travel with the checkpoint",
    "--target-expert-parallel-size": "no InternVL2 model has experts",
    "--make-vocab-size-divisible-by": "vocabulary rows are padded when a model is built, for its own tp",
    "--true-vocab-size": "the vocabulary size is read from config.json",
    "--megatron-path": "megatron-core is an installed dependency",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the tool."""
    add_common_arguments(
        parser, load="Hugging Face folder: config.json, safetensors, tokenizer", save="checkpoint"
    )
    for axis, short in (("tensor", "tp"), ("pipeline", "pp"), ("virtual-pipeline", "vpp")):
        help_text = f"{short} that the model has to suit (default: 1)"
        parser.add_argument(
            f"--target-{axis}-parallel-size", dest=short, type=int, default=1, metavar="N", help=help_text
        )
    dtypes = parser.add_mutually_exclusive_group()
    for flag, dtype in (("--bf16", "bfloat16"), ("--fp16", "float16")):
        help_text = f"cast to {dtype} (default: every tensor keeps its dtype)"
        dtypes.add_argument(
            flag, dest="dtype", action="store_const", const=dtype, default="keep", help=help_text
        )


def run(args: argparse.Namespace) -> int:
    """Check the target layout, convert, say how to train with it."""
    from megatron_v2pe.checkpoint.convert.import_hf import import_hf
    from megatron_v2pe.cli.arguments import shared_progress
    from megatron_v2pe.core.env import launcher

    layout = target_layout(args.load_dir, tp=args.tp, pp=args.pp, vpp=args.vpp)
    options = {"force": args.force, "dtype": args.dtype, "target_layout": layout}
    with shared_progress("hf_to_megatron") as progress:
        info = import_hf(args.load_dir, args.save_dir, progress=progress, expect=progress.expect, **options)
    if launcher().rank == 0:
        overrides = [f"model.checkpoint={args.save_dir}"]
        overrides += [f"parallel.{axis}={size}" for axis, size in layout.items()]
        print(f"{args.save_dir}: {info.family}, {info.num_parameters:,} parameters")
        print(f"train with: megatron-v2pe train RUN.yaml {' '.join(overrides)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run_tool(parser, run, argv, foreign=FOREIGN)


if __name__ == "__main__":
    sys.exit(main())
