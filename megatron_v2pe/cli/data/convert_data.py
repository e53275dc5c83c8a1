"""`convert-data`: annotation files of other forms to one record a line, or a look through them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError, DataError

NAME = "convert-data"
HELP = """write one record a line, from json arrays, gzip, parquet, CSV, TSV and jsonl files

Write:   megatron-v2pe convert-data train.json more.parquet --out train.jsonl
A table: megatron-v2pe convert-data answers.csv --out train.jsonl --meta data.json --root photos
         Columns named image (or file), question and answer are recognised; others are named with --columns.
         --meta writes the meta json that a run's data.meta names.
Images inside the records (base64, bytes of parquet) become files:
         megatron-v2pe convert-data train.parquet --out train.jsonl --media images
Look:    megatron-v2pe convert-data train.jsonl --check        (also without --out)

Every record is checked as training will read it. Formats (InternVL, ShareGPT, OpenAI, LLaMA-Factory, ms-swift,
LLaVA-Video) are recognised, and said. Bad records are named, not written, and make the exit code 2 unless
--skip-bad is given. Lengths and images are measured by index-data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from megatron_v2pe.data.sources.meta import FORMATS

    parser.add_argument("files", nargs="+", metavar="FILE", help="json, jsonl, gzip, parquet, CSV or TSV")
    parser.add_argument("--out", metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--check", action="store_true", help="only look through the files")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="format of the records")
    parser.add_argument(
        "--columns",
        default="",
        metavar="M=C,M=C",
        help="which columns hold what, for example image=file,question=q,answer=a (also video, system, id)",
    )
    parser.add_argument("--media", metavar="FOLDER", help="folder for images that are inside records")
    parser.add_argument("--meta", metavar="META.json", help="write a meta json with this one data set, too")
    parser.add_argument(
        "--root", metavar="FOLDER", help="with --meta: where images and videos are; default: --media"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing")


def run(args: argparse.Namespace) -> int:
    """Convert or check; the summary goes to stdout."""
    from megatron_v2pe.core.files import write_atomic
    from megatron_v2pe.data.samples.columns import parse_columns
    from megatron_v2pe.data.samples.convert import Converter
    from megatron_v2pe.data.sources.meta import DatasetEntry

    _check_arguments(args)
    columns = parse_columns(args.columns)
    media = Path(args.media) if args.media and not args.check else None
    if media is not None:
        media.mkdir(parents=True, exist_ok=True)
    entry = DatasetEntry(name="data", annotation=args.files[0], format=args.format)
    converter = Converter(entry, media, columns)
    lines = converter.lines(args.files)
    result = converter.result
    sys.stdout.write(result.text())
    if result.bad and not args.skip_bad:
        outcome = "" if args.check else " nothing was written;"
        raise DataError(f"{len(result.bad)} records are bad;{outcome} repair them, or give --skip-bad")
    if args.out:
        write_atomic(Path(args.out), "".join(f"{line}\n" for line in lines))
        sys.stdout.write(f"{args.out}\n")
    if args.meta:
        write_atomic(Path(args.meta), _meta(args))
        sys.stdout.write(f"{args.meta}\n")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.check == bool(args.out):
        raise ConfigError("give --out OUT.jsonl to write, or --check to look only")
    if args.meta and not args.out:
        raise ConfigError("--meta names the file of --out, which is not given; give --out OUT.jsonl")
    if args.root and not args.meta:
        raise ConfigError(
            "--root is written into the file of --meta, which is not given; give --meta META.json"
        )
    if args.root and not Path(args.root).is_dir():
        raise ConfigError(f"--root is {args.root!r}, which is no folder; name the folder of the images")
    if args.meta and Path(args.meta).exists():
        raise ConfigError(f"--meta: {args.meta} is there already; choose another name, or remove it")


def _meta(args: argparse.Namespace) -> str:
    """A meta json of one data set, whose paths are relative to it where that is shorter."""
    beside = Path(args.meta).resolve().parent

    def near(path: str) -> str:
        whole = Path(path).resolve()
        return str(whole.relative_to(beside) if whole.is_relative_to(beside) else whole)

    root = args.root or args.media
    entry = {
        "annotation": near(args.out),
        "root": near(root) if root else "",
        "repeat_time": 1,
        "data_augment": False,
    }
    return json.dumps({Path(args.out).stem: entry}, indent=2) + "\n"
