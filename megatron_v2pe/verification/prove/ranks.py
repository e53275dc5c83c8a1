"""The processes of a proof: one that computes alone, then those of the layout, which compare themselves with it.

    prove --task.json, packs.npz, config.yaml--> one rank  --reference.pt--> N ranks --rank_N.json--> prove

Every process works the narrow model out for itself, from the same checkpoint's config.json and the same layout.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.batch.packed_batch import PackedBatch, tile_share
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.config.schema import ParallelConfig, RunConfig
from megatron_v2pe.core.env import child_environment, launcher
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.logging import quiet_dependencies, setup_logging
from megatron_v2pe.core.plain_files import read_json_object
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed, resolve, shutdown
from megatron_v2pe.verification.prove.layout import ProvenLayout
from megatron_v2pe.verification.prove.narrow import narrow_architecture
from megatron_v2pe.verification.prove.shapes import PackShape, filled_pack, from_arrays

CONFIG, PACKS, TASK, REFERENCE = "config.yaml", "packs.npz", "task.json", "reference.pt"
DTYPES = ("float64", "float32")
TIMEOUT_MINUTES = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the processes of a proof share, beside the files of the same folder.

    Attributes:
        hf_folder: of the run's model.
        layout: what runs.
        tile_side: patches on the side of a narrow tile.
        mutations: names of those to run.
    """

    hf_folder: str
    layout: ProvenLayout
    tile_side: int
    mutations: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write it for `read_task`."""
        write_atomic(folder / TASK, json.dumps(dataclasses.asdict(self)))


def read_task(folder: Path) -> Task:
    """The task of a folder."""
    values = read_json_object(folder / TASK)
    layout = values["layout"]
    layout["parallel"] = ParallelConfig(**layout["parallel"])
    layout["notes"] = tuple(layout["notes"])
    return Task(**{**values, "layout": ProvenLayout(**layout), "mutations": tuple(values["mutations"])})


def run_alone(folder: Path) -> None:
    """One rank's results, into the folder.

    Raises:
        RuntimeError: it ended with an error; its traceback is on stderr.
    """
    _run([sys.executable, "-m", __spec__.name, str(folder), "alone"], "the single rank")


def run_layout(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What each rank of the layout found.

    Raises:
        RuntimeError: a rank ended with an error; its traceback is on stderr.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    _run([sys.executable, *launch, "-m", __spec__.name, str(folder), "layout"], "a rank of the layout")
    return [read_json_object(folder / f"rank_{rank}.json") for rank in range(world_size)]


def _run(command: list[str], who: str) -> None:
    """One thread for each process, for they share the cores; GPUs are hidden: torch has no fused float64 there."""
    variables = child_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=variables, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{who} of prove ended with an error (exit code {done.returncode})")


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one process runs."""

    config: RunConfig
    arch: InternVLArchitecture
    context: ParallelContext
    packs: list[PackedBatch]

    def in_dtype(self, dtype: str) -> RunConfig:
        """The run in another dtype; float64 is for comparisons only, and no value of the schema."""
        runtime: Any = {"dtype": dtype}
        return dataclasses.replace(self.config, runtime=dataclasses.replace(self.config.runtime, **runtime))


def _work(folder: Path, task: Task, parallel: ParallelConfig) -> _Work:
    config = dataclasses.replace(load_run_config(folder / CONFIG), parallel=parallel)
    arch = narrow_architecture(read_architecture(Path(task.hf_folder)), task.layout, tile_side=task.tile_side)
    context = init_distributed(
        resolve(parallel, launcher().world_size), seed=1, timeout_minutes=TIMEOUT_MINUTES
    )
    with np.load(folder / PACKS, allow_pickle=False) as arrays:
        shapes = from_arrays(arrays)
    return _Work(config=config, arch=arch, context=context, packs=_packs(shapes, arch, context))


def _packs(
    shapes: Sequence[PackShape], arch: InternVLArchitecture, context: ParallelContext
) -> list[PackedBatch]:
    """This data parallel rank's micro batches, every dp-th, as the loader assigns them."""
    plan, ranks = context.plan, context.ranks

    def share(num_tiles: int) -> tuple[int, int]:
        return tile_share(num_tiles, plan.tile_ranks, ranks.tile_rank) if ranks.is_first_stage else (0, 0)

    return [
        filled_pack(shapes[number], number, arch, pad_to_multiple=plan.pad_to_multiple, tile_range_of=share)
        for number in range(ranks.dp_rank, len(shapes), plan.dp)
    ]


def _alone(folder: Path, task: Task) -> None:
    import torch

    from megatron_v2pe.verification.prove.steps import run_backward, run_steps, wholes

    work = _work(folder, task, ParallelConfig())
    vocab_size = work.arch.language.vocab_size
    double = run_backward(work.in_dtype("float64"), work.arch, work.context, work.packs)
    single = run_steps(work.config, work.arch, work.context, work.packs)
    found = {
        "float64": wholes(double, vocab_size=vocab_size),
        "float32": wholes(single, vocab_size=vocab_size),
    }
    torch.save(found, folder / REFERENCE)


def _layout(folder: Path, task: Task) -> None:
    import torch

    from megatron_v2pe.verification.prove.mutations import MUTATIONS
    from megatron_v2pe.verification.prove.slices import held_by
    from megatron_v2pe.verification.prove.steps import compare, run_backward, run_steps

    wanted = torch.load(folder / REFERENCE, weights_only=True)
    work = _work(folder, task, task.layout.parallel)
    rank = work.context.ranks.rank
    double = run_backward(work.in_dtype("float64"), work.arch, work.context, work.packs)
    single = run_steps(work.config, work.arch, work.context, work.packs)
    found: dict[str, Any] = {
        "errors": {
            "float64": compare(double, wanted["float64"]),
            "float32": compare(single, wanted["float32"]),
        },
        "held": held_by(single.gradients),
        "mutations": {},
    }
    for name in task.mutations:
        with MUTATIONS[name].variant():
            outcome = run_steps(work.config, work.arch, work.context, work.packs, steps=1)
        found["mutations"][name] = compare(outcome, wanted["float32"])
    write_atomic(folder / f"rank_{rank}.json", json.dumps(found))


def _main(arguments: Sequence[str]) -> None:
    """What each started process does."""
    folder, role = Path(arguments[0]), arguments[1]
    setup_logging(launcher().rank)
    quiet_dependencies()
    task = read_task(folder)
    _alone(folder, task) if role == "alone" else _layout(folder, task)
    shutdown()


if __name__ == "__main__":
    _main(sys.argv[1:])
