"""From the command line's options to a `SynthesisConfig`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.synthesis.kinds import parse_kinds, parse_lengths
from megatron_v2pe.synthesis.settings import SynthesisConfig


def config_from(args: Namespace) -> SynthesisConfig:
    """Check and translate options.

    Args:
        args: see `cli/synthesize.py`.

    Raises:
        ConfigError: an option cannot work, or several ranks were started.
    """
    if launcher().world_size > 1:
        raise ConfigError(
            f"synthesize starts its own processes, {launcher().world_size} were started; leave torchrun out and give "
            "--workers"
        )
    if args.vqa_images and not args.vqa:
        raise ConfigError(f"--vqa-images is {args.vqa_images!r}, but --vqa is missing; give both or none")
    return SynthesisConfig(
        kinds=parse_kinds(args.kind),
        lengths=parse_lengths(args.tokens),
        count=args.count,
        num_depths=args.depths,
        split=args.split,
        held_out=args.held_out,
        text_per_image=args.text_per_image,
        num_decoys=args.decoys,
        seed=args.seed,
        texts=args.texts,
        images=args.images,
        vqa=args.vqa,
        vqa_images=args.vqa_images or (str(Path(args.vqa).parent) if args.vqa else ""),
        out=args.out,
        workers=args.workers,
    )
