"""`main` on ranks of which rank 1 gets more arguments than the others: those in V2PE_TEST_OF_RANK_1, as a json list."""

import json
import os
from collections.abc import Sequence

from megatron_v2pe.cli import main as cli


def main(arguments: Sequence[str]) -> int:
    own = json.loads(os.environ.get("V2PE_TEST_OF_RANK_1", "[]")) if os.environ.get("RANK") == "1" else []
    return cli.main([*arguments, *own])
