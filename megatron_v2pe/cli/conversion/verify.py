"""`verify`: does a checkpoint hold exactly what a Hugging Face folder holds?"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, NoReturn

from megatron_v2pe.cli.arguments import add_verify_checkpoint, byte_progress
from megatron_v2pe.core.errors import ConfigError

NAME = "verify"
HELP = """compare a checkpoint with a Hugging Face folder, tensor by tensor and bit by bit

Example:  megatron-v2pe verify InternVL2-2B checkpoints/internvl2-2b

Every tensor of both sides is accounted for. The SHA-256 is taken over names, dtypes, shapes and bytes of all tensors;
a folder, its import and what that exports to have the same one. Exit code 0: equal, 1: not, 2: cannot be compared.

`megatron-v2pe verify-numerics` compares what the two compute, at any parallel layout."""


class _MovedOption(argparse.Action):
    """`--numerics` of earlier versions; whatever else is given, the answer is the verb's new name."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise ConfigError(
            "verify --numerics is now a verb of its own: megatron-v2pe verify-numerics HF_FOLDER CHECKPOINT, with the "
            "same options"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("hf_folder", help="Hugging Face folder")
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="the whole report as json instead of text")
    parser.add_argument("--numerics", action=_MovedOption, nargs=0, help=argparse.SUPPRESS)
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when equal, 1 when not."""
    from megatron_v2pe.verification.bits import verify

    with byte_progress(NAME) as progress:
        report = verify(args.hf_folder, args.checkpoint, files=args.verify_checkpoint, progress=progress)
    text = json.dumps(report.to_json(), indent=2) if args.json else "\n".join(report.lines())
    sys.stdout.write(text + "\n")
    return 0 if report.is_equal else 1
