"""`add-piip`: a Hugging Face InternVL folder gets a pyramid of smaller networks around its vision tower."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

NAME = "add-piip"
HELP = """write a copy of a Hugging Face InternVL folder with a pyramid (PIIP) around its vision tower

    megatron-v2pe add-piip InternVL2-2B pyramid.yaml InternVL2-2B-piip
    megatron-v2pe import-hf InternVL2-2B-piip checkpoints/internvl2-2b-piip

The recipe names the smaller branches, the pixels of a tile that each sees, and where its weights come from (an
InternViT folder, a timm vision transformer, or random). Gates start at zero: with the readout large the new model
computes what the old one does until it is trained; the readout llava has a new, random projector and other tokens per
tile, and must be trained first. Only this package reads such a folder; docs/piip.md has the format."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="config.json, *.safetensors, tokenizer files")
    parser.add_argument("recipe", help="YAML file of the pyramid")
    parser.add_argument("target", help="folder to create")
    parser.add_argument("--force", action="store_true", help="replace the target folder if it exists")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default 0)")


def run(args: argparse.Namespace) -> int:
    """Add the pyramid; errors are raised as CheckpointError or ConfigError."""
    from megatron_v2pe.checkpoint.convert.add_pyramid import add_pyramid
    from megatron_v2pe.cli.arguments import require_one_process

    require_one_process(NAME)
    arch = add_pyramid(args.hf_folder, args.recipe, args.target, force=args.force, seed=args.seed)
    sizes = " + ".join(f"{size} px" for size in arch.tile_sizes)
    before = replace(arch, pyramid=None).tokens_per_tile
    tokens = f"{before} tokens a tile as before"
    if arch.reads_all_branches:
        tokens = (
            f"{arch.tokens_per_tile} tokens a tile ({before} before) from a projector that is not trained yet"
        )
    sys.stdout.write(f"{args.target}: tiles of {sizes}, {tokens}\n")
    return 0
