"""Golden cases of the model on several ranks of this machine.

check-golden --tp 2 --cp 2
  +- torch.distributed.run, 4 processes of this module
       every rank runs the model groups; rank 0 prints rows as they come and writes them to a file
  reads that file, so that torchrun's exit code, which is 1 for any reason, does not hide "unsupported"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.env import child_environment, launcher
from megatron_v2pe.core.jsonl import append_json, read_jsonl
from megatron_v2pe.core.logging import setup_logging
from megatron_v2pe.parallel.topology import shutdown
from megatron_v2pe.verification.golden.rows import Row, format_row
from megatron_v2pe.verification.golden.runner import Group, run_groups, select_groups


def ranks_needed(parallel: ParallelConfig) -> int:
    """Smallest world of whole model replicas whose pipeline stages have etp x ep ranks."""
    stage, spread = parallel.tp * parallel.cp, parallel.ep * parallel.expert_tp
    return parallel.pp * math.lcm(stage, spread)


def run_on_local_ranks(
    folder: Path, groups: Sequence[Group], *, family: str | None, parallel: ParallelConfig
) -> list[Row]:
    """Start the ranks of one model replica, or of as many as its experts lie on, print rank 0's rows, and return them.

    Raises:
        RuntimeError: a rank ended with an error; its traceback is on stderr.
    """
    num_ranks = ranks_needed(parallel)
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.jsonl"
        task = {
            "folder": str(folder),
            "groups": [group.name for group in groups],
            "family": family,
            "parallel": dataclasses.asdict(parallel),
        }
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(num_ranks),
        ]
        command += ["-m", __spec__.name, json.dumps(task), str(rows_file)]
        # One thread per rank, as torchrun would set with a warning: the ranks share the cores.
        done = subprocess.run(command, env=child_environment(OMP_NUM_THREADS="1"), check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"a rank of check-golden ended with an error (torchrun exit code {done.returncode})"
            )
        return [Row(**values) for _, values in read_jsonl(rows_file)]


def _rank_main(arguments: Sequence[str]) -> None:
    """What each started rank does."""
    parser = argparse.ArgumentParser(prog=__spec__.name)
    parser.add_argument("task", type=json.loads)
    parser.add_argument("rows_file", type=Path)
    options = parser.parse_args(arguments)
    task, rank = options.task, launcher().rank
    setup_logging(rank)
    folder, parallel = Path(task["folder"]), ParallelConfig(**task["parallel"])
    if rank == 0:
        options.rows_file.touch()
    for name in task["groups"]:
        groups = select_groups(folder, name=name, model_only=True)
        for row in run_groups(folder, groups, family=task["family"], parallel=parallel):
            if rank == 0:
                sys.stdout.write(format_row(row) + "\n")
                sys.stdout.flush()
                append_json(options.rows_file, dataclasses.asdict(row))
    shutdown()


if __name__ == "__main__":
    _rank_main(sys.argv[1:])
