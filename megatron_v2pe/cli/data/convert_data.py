"""`convert-data`: annotation files of other forms to one record a line, or a look through them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError, DataError

NAME = "convert-data"
HELP = """write one record a line, from json arrays, gzip, parquet and jsonl files

Write:   megatron-v2pe convert-data train.json more.parquet --out train.jsonl
Images inside the records (base64, bytes of parquet) become files:
         megatron-v2pe convert-data train.parquet --out train.jsonl --media images
Look:    megatron-v2pe convert-data train.jsonl --check        (also without --out)

Every record is checked as training will read it. Formats (InternVL, ShareGPT, OpenAI, LLaMA-Factory, ms-swift,
LLaVA-Video) are recognised, and said. Bad records are named, not written, and make the exit code 2 unless
--skip-bad is given. Lengths and images are measured by index-data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from megatron_v2pe.data.sources.meta import FORMATS

    parser.add_argument("files", nargs="+", metavar="FILE", help="json, jsonl, gzip or parquet")
    parser.add_argument("--out", metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--check", action="store_true", help="only look through the files")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="format of the records")
    parser.add_argument("--media", metavar="FOLDER", help="folder for images that are inside records")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing")


def run(args: argparse.Namespace) -> int:
    """Convert or check; the summary goes to stdout."""
    if args.check == bool(args.out):
        raise ConfigError("give --out OUT.jsonl to write, or --check to look only")

    from megatron_v2pe.core.files import write_atomic
    from megatron_v2pe.data.samples.convert import Converter
    from megatron_v2pe.data.sources.meta import DatasetEntry

    media = Path(args.media) if args.media and not args.check else None
    if media is not None:
        media.mkdir(parents=True, exist_ok=True)
    entry = DatasetEntry(name="data", annotation=args.files[0], format=args.format)
    converter = Converter(entry, media)
    lines = converter.lines(args.files)
    result = converter.result
    sys.stdout.write(result.text())
    if result.bad and not args.skip_bad:
        outcome = "" if args.check else " nothing was written;"
        raise DataError(f"{len(result.bad)} records are bad;{outcome} repair them, or give --skip-bad")
    if args.out:
        write_atomic(Path(args.out), "".join(f"{line}\n" for line in lines))
        sys.stdout.write(f"{args.out}\n")
    return 0
