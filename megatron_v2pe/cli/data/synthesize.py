"""`synthesize`: long-context training and evaluation data from folders of texts and images."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_v2pe.synthesis.settings import SynthesisConfig

NAME = "synthesize"
HELP = """make long documents with something hidden in them, and the question that finds it

KIND is a comma list of kinds or groups: text-retrieval, text-counting, text-reasoning, text-decoys, text-absent;
image-retrieval, image-counting, image-decoys, image-absent, image-jigsaw, image-multiview; longvqa-pages,
longvqa-paste (from --vqa, a jsonl of short visual questions); groups text, image, needles, longvqa, all.

Every sample has exactly the asked number of tokens as training counts them, template and answer included. OUT gets
KIND.jsonl, images/ and meta.json, which `data.meta` and `evaluate --data` read; split eval also gets mm_niah/. Splits
share no passage, image or needle. The same command continues where it was interrupted, with any number of workers.

Example: megatron-v2pe synthesize needles --texts books --images photos --tokenizer InternVL2-2B --tokens 32K,256K
--count 1000 --out data/long_train"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("kind", metavar="KIND", help="kinds of samples, see above")
    parser.add_argument("--texts", required=True, help="folder of .txt, .md, .html or .jsonl ('text') files")
    parser.add_argument("--images", default="", help="folder of images; documents have none without it")
    parser.add_argument("--vqa", default="", help="jsonl of short visual questions, for longvqa kinds")
    parser.add_argument("--vqa-images", default="", help="folder of its images (default: the jsonl's)")
    parser.add_argument("--tokenizer", required=True, help="checkpoint or Hugging Face folder")
    parser.add_argument("--tokens", required=True, help="length, or comma list: 4096,32K,1M")
    parser.add_argument("--count", type=int, required=True, help="samples of each kind and length")
    parser.add_argument("--out", required=True, help="folder to make or to finish")
    parser.add_argument("--split", choices=("train", "eval"), default="train", help="whose material")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the material for eval")
    parser.add_argument("--depths", type=int, default=5, help="bands of depth, used in turn")
    parser.add_argument("--text-per-image", type=int, default=2000, help="tokens of text for each image")
    parser.add_argument("--decoys", type=int, default=3, help="decoys of the kinds that have them")
    parser.add_argument("--max-dynamic-patch", type=int, default=12, help="most tiles per image")
    parser.add_argument("--no-tiling", action="store_true", help="one tile per image")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")


def run(args: argparse.Namespace) -> int:
    """Synthesize; the meta json's path goes to stdout."""
    from megatron_v2pe.checkpoint.files.folder import hf_path, is_complete
    from megatron_v2pe.config.schema import DataConfig
    from megatron_v2pe.synthesis.run import synthesize

    if launcher().world_size > 1:
        raise ConfigError(
            f"synthesize starts its own processes, {launcher().world_size} were started; start it without torchrun "
            "and give --workers"
        )
    hf_folder = hf_path(args.tokenizer) if is_complete(args.tokenizer) else args.tokenizer
    data = DataConfig(max_dynamic_patch=args.max_dynamic_patch, dynamic_image_size=not args.no_tiling)
    outcome = synthesize(_synthesis_config(args), hf_folder=hf_folder, data=data)
    sys.stderr.write(f"{outcome.num_new} of {outcome.num_records} records made in {outcome.seconds:.1f} s\n")
    sys.stdout.write(f"{args.out}/meta.json\n")
    return 0


def _synthesis_config(args: argparse.Namespace) -> SynthesisConfig:
    from megatron_v2pe.synthesis.kinds import parse_kinds, parse_lengths
    from megatron_v2pe.synthesis.settings import SynthesisConfig

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
