"""`prove`: does this run's parallel layout compute what one rank computes? A page that says so, with its evidence."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_v2pe.cli.arguments import add_run_config, require_one_process, run_config
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic

NAME = "prove"
HELP = """show that a run's parallel layout computes what one rank computes, on the CPUs of this machine

Here:            megatron-v2pe prove run.yaml
As a document:   megatron-v2pe prove run.yaml --out certificate.md     # and certificate.json
On 4 processes:  megatron-v2pe prove run.yaml --ranks 4

The layout of the run (tp, pp, cp, ep, sequence parallelism, their options) is started on processes of this machine
with a narrow model of the run's kind and the shapes of its first packs: documents, images, tiles, strides, labels. Loss
and every gradient are compared with one process in float64, and with gradient norm and two updates in float32. Then
mistakes are put into the ranks, one after the other, each of which the comparison must catch. Axes that need more ranks
than --ranks become smaller, never 1; the page says what differs. Lengths of the data are measured first, as `train`
does.

Exit code 0: proven, 1: not, 2: a mistake, or something that cannot be proven."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_run_config(parser)
    parser.add_argument(
        "--ranks", type=int, default=8, metavar="N", help="most processes, 0.6 GB each (default 8)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="most tokens of a narrow pack (default 512)"
    )
    parser.add_argument("--out", metavar="FILE.md", help="write the page there, and FILE.json beside it")


def run(args: argparse.Namespace) -> int:
    """Print the page; 0 when the layout is proven, 1 when not."""
    require_one_process(NAME)
    config = run_config(args.config, args.overrides)
    out = None if args.out is None else _checked_out(args.out)

    from megatron_v2pe.verification.prove.command import ProofRequest, prove

    name = " ".join([Path(args.config).name if args.config else "settings", *args.overrides])
    certificate = prove(ProofRequest(config=config, max_ranks=args.ranks, max_tokens=args.tokens, name=name))
    page = certificate.markdown()
    sys.stdout.write(page)
    if out is not None:
        write_atomic(out, page)
        write_atomic(out.with_suffix(".json"), json.dumps(certificate.as_json(), indent=2) + "\n")
    return 0 if certificate.is_proven else 1


def _checked_out(text: str) -> Path:
    """The page's file, refused before minutes of work."""
    path = Path(text)
    if path.suffix != ".md":
        raise ConfigError(
            f"--out is {text!r}, but must end in .md; its numbers are written to .json beside it"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--out is {text!r}, but the folder {path.parent} does not exist; make it first")
    return path
