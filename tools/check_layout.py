"""Build every rank of a layout without weights and check that their shards make up the model, each element once.

    python tools/check_layout.py --size 76B --tp 8 --pp 4
    python tools/check_layout.py --arch-from InternVL2-26B/config.json --tp 4 --pp 2 --cp 4 --sp --split-tower

One process, no GPU, no weights: each rank in turn is built on the meta device in a world that is never started. Printed
are each stage's parameters and the bytes that training keeps; the last lines say whether names, shapes and shards are
right. Exit code 0: they are, 1: they are not, 2: the layout does not fit the model.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; see parallel/fake_world.py

from megatron_v2pe.checkpoint.hf.name_map import family_name, name_map
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture, read_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError, V2PEError
from megatron_v2pe.core.logging import quiet_dependencies
from megatron_v2pe.parallel.plan import ParallelPlan, resolve

GIB = 2**30


def main() -> int:
    """Print the report; see the module docstring for the exit code."""
    options = parse_arguments()
    quiet_dependencies()  # before megatron-core is imported
    try:
        arch = architecture(options)
        config = RunConfig(parallel=parallel_config(options))
        plan = resolve(config.parallel, options.tp * options.pp * options.cp * options.dp)
        return check(config, arch, plan)
    except V2PEError as error:
        sys.stderr.write(f"check_layout: {error}\n")
        return 2


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--size", choices=PUBLISHED, help="a published size of InternVL2, or of a later series: 3.5-38B"
    )
    model.add_argument("--arch-from", type=Path, metavar="CONFIG_JSON", help="config.json, or its folder")
    for name, what in (
        ("tp", "tensor"),
        ("pp", "pipeline"),
        ("cp", "context"),
        ("dp", "data"),
        ("ep", "expert"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what} parallel size")
    parser.add_argument("--etp", type=int, default=0, metavar="N", help="ranks that split each expert")
    parser.add_argument("--vpp", type=int, default=1, metavar="N", help="virtual stages of a pipeline rank")
    parser.add_argument(
        "--layout", default="", help="decoder layers of each stage, such as Et*19|t*20|t*20|t*21L"
    )
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--split-tower", action="store_true", help="split the vision tower over tp")
    return parser.parse_args()


def architecture(options: argparse.Namespace) -> InternVLArchitecture:
    """The model that was asked for."""
    if options.size:
        return parse_architecture(PUBLISHED[options.size], f"published {options.size}")
    path: Path = options.arch_from
    return read_architecture(path.parent if path.name == "config.json" else path)


def parallel_config(options: argparse.Namespace) -> ParallelConfig:
    """The layout that was asked for."""
    if options.dp < 1:
        raise ConfigError(f"--dp is {options.dp}, but must be at least 1")
    return ParallelConfig(
        tp=options.tp,
        pp=options.pp,
        cp=options.cp,
        vpp=options.vpp,
        ep=options.ep,
        etp=options.etp,
        sequence_parallel=options.sp,
        pipeline_layout=options.layout,
        vision="tensor" if options.split_tower else "replicated",
    )


def check(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan) -> int:
    """Build every rank, then say what was found."""
    from megatron_v2pe.assembly.rank_model import rank_model
    from megatron_v2pe.checkpoint.layout_check import Tiling, rank_shards

    names = name_map(arch)
    print(
        f"{family_name(arch)}: {len(names.by_ours)} parameters, {names.num_parameters:,} numbers; "
        f"tp {plan.tp} pp {plan.pp} vpp {plan.vpp} cp {plan.cp} dp {plan.dp}, {plan.world_size} ranks, "
        f"{config.runtime.dtype}"
    )
    tiling, started = Tiling(), time.perf_counter()
    held: list[tuple[int, int]] = []
    for rank in range(plan.world_size):
        with rank_model(config, arch, plan=plan, rank=rank) as (model_chunks, ranks):
            tiling.add(rank_shards(model_chunks, ranks))
            parameters = [p for model_chunk in model_chunks for p in model_chunk.parameters()]
            held.append((len(parameters), sum(parameter.numel() for parameter in parameters)))
        show_progress(rank + 1, plan.world_size)
    print_stages(config, arch, plan, held)
    problems = tiling.problems(names)
    print(
        f"\n{tiling.num_ranks} ranks built in {time.perf_counter() - started:.0f} s: {tiling.num_shards} shards of "
        f"{tiling.num_tensors} tensors"
    )
    for problem in problems[:20]:
        print(f"WRONG  {problem}")
    if problems:
        print(f"{len(problems)} problems")
        return 1
    print("every name is the table's, every shape is right, every element is written once")
    return 0


def print_stages(
    config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan, held: list[tuple[int, int]]
) -> None:
    """A line for each pipeline rank; its tensor parallel ranks hold equal amounts, which shows here."""
    from megatron_v2pe.assembly.rank_model import build_rank_bytes

    per_stage = plan.world_size // plan.pp
    print(
        f"\n{'pp':>3} {'ranks':>9} {'tensors':>8} {'numbers':>16} {'weights':>9} {'grads':>9} {'Adam':>9}  GiB each"
    )
    for stage in range(plan.pp):
        first = stage * per_stage
        amounts = sorted(set(held[first : first + per_stage]))
        sizes = build_rank_bytes(config, arch, plan=plan, rank=first)
        span = f"{first}-{first + per_stage - 1}"
        kept = in_gib((sizes.parameters, sizes.gradients, sizes.optimizer))
        for tensors, numbers in amounts:
            print(f"{stage:>3} {span:>9} {tensors:>8} {numbers:>16,} {kept}")


def in_gib(sizes: Iterable[int]) -> str:
    """Bytes in GiB, in columns."""
    return " ".join(f"{size / GIB:>9.3f}" for size in sizes)


def show_progress(done: int, total: int) -> None:
    """A counter on stderr, if that is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} ranks{chr(10) if done == total else ''}")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
