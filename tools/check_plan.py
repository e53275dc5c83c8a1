"""The planner against real ranks and steps: state of ranks to the byte, activation peaks of real steps, on CPU.

    python tools/check_plan.py state          ranks of published sizes built without memory, up to 76B on 256 ranks
    python tools/check_plan.py activations    peak of a small step by length and option, measured and predicted
    python tools/check_plan.py ranks          the same over 2 ranks: cp, tp with sequence parallelism, pp
    python tools/check_plan.py                all of them, some minutes on two cores

Measured peaks are counted by torch's profiler at its allocator, as in bench_memory.py; they do not depend on what else
the machine does. Exit code 1 when a state differs or a peak is more than 10 % off.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from typing import Any

from bench_support.step import machine, on_ranks

from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import (
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.planning.estimate import activation_peak
from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes, peak_bytes
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.planner_check import compare_rank
from megatron_v2pe.planning.request.workload import Pack

MIB = 2**20
TOLERANCE = 0.10

FULL = {"model": ModelConfig(recompute="full"), "vision": VisionConfig(recompute="full")}
LEAST = {
    "model": ModelConfig(recompute="full", mlp_chunks=4, loss_chunk_tokens=256),
    "vision": VisionConfig(recompute="full", micro_batch_tiles=8),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing recomputed": {},
    "model.recompute=selective": {"model": ModelConfig(recompute="selective")},
    "model.recompute=full": {"model": ModelConfig(recompute="full")},
    "both recompute=full": FULL,
    "full, mlp_chunks=4, slices of 8 tiles": LEAST,
    "vision.freeze=true": {"vision": VisionConfig(freeze=True)},
    "model.freeze_language=true": {"model": ModelConfig(freeze_language=True)},
    "adapters of rank 4 everywhere": {"lora": LoRAConfig(language_rank=4, vision_rank=4, projector_rank=4)},
    "adapters of the language, dropout": {"lora": LoRAConfig(language_rank=4, dropout=0.1)},
}
RANKS: dict[str, dict[str, Any]] = {
    "cp=2": {"parallel": ParallelConfig(cp=2)},
    "cp=2, both recompute=full": {"parallel": ParallelConfig(cp=2), **FULL},
    "cp=2 all_gather": {"parallel": ParallelConfig(cp=2, cp_comm_type="all_gather")},
    "cp=2 a2a": {"parallel": ParallelConfig(cp=2, cp_comm_type="a2a")},
    "tp=2 sequence_parallel": {"parallel": ParallelConfig(tp=2, sequence_parallel=True)},
    "tp=2 sequence_parallel, both recompute=full": {
        "parallel": ParallelConfig(tp=2, sequence_parallel=True),
        **FULL,
    },
    "pp=2, 4 micro batches": {"parallel": ParallelConfig(pp=2)},
}
STATES = (
    ("1B", 8, ParallelConfig(pp=2, cp=2)),
    ("2B", 4, ParallelConfig()),
    ("8B", 32, ParallelConfig(tp=2, pp=2, cp=8, vpp=2, sequence_parallel=True)),
    ("26B", 32, ParallelConfig(tp=4, cp=8, vision="tensor", sequence_parallel=True)),
    ("40B", 64, ParallelConfig(tp=8, pp=2, cp=4)),
    ("76B", 256, ParallelConfig(tp=8, pp=4, cp=8, sequence_parallel=True)),
)


def measured_peak(sizes: StepSizes, config: RunConfig, micro_batches: int) -> int:
    """Peak of a step on this rank."""
    step = MeasuredStep(config=config, sizes=sizes)
    if micro_batches == 1:
        return peak_bytes(step)
    step.wrapped[0].zero_grad_buffer()
    step.runner.reset()
    batches = [step.batch] * micro_batches
    return peak_bytes(lambda: run_schedule(step.wrapped, step.runner.forward_step, batches))


def predicted_peaks(sizes: StepSizes, config: RunConfig, world_size: int, micro_batches: int) -> list[float]:
    """The planner's peak of each pipeline rank."""
    plan = resolve(config.parallel, world_size)
    pack = Pack(
        document_lengths=(sizes.tokens,),
        num_tiles=sizes.tiles,
        supervised_tokens=round(sizes.supervised * sizes.tokens),
        source="benchmark",
    )
    setting = Setting(
        config=config,
        arch=sizes.architecture(),
        plan=plan,
        pack=pack.padded(plan),
        backend="native",
        on_cpu=True,
    )
    return [
        activation_peak(setting, pp_rank=rank, micro_batches=micro_batches).total_bytes
        for rank in range(plan.pp)
    ]


def compare(
    name: str, sizes: StepSizes, config: RunConfig, *, world_size: int, micro_batches: int = 1
) -> bool:
    """One row for each pipeline rank; the fullest of its copies is measured."""
    peaks = on_ranks(measured_peak, world_size, sizes, config, micro_batches)
    stages = config.parallel.pp
    met = True
    for stage, predicted in enumerate(predicted_peaks(sizes, config, world_size, micro_batches)):
        found = max(peaks[stage * len(peaks) // stages : (stage + 1) * len(peaks) // stages])
        off = predicted / found - 1
        met = met and abs(off) <= TOLERANCE
        where = f"{name}, stage {stage}" if stages > 1 else name
        print(
            f"| {where} | {sizes.tokens} | {found / MIB:.1f} | {predicted / MIB:.1f} | {off:+.1%} |",
            flush=True,
        )
    return met


def heading() -> None:
    """Columns of the tables."""
    print("| step | tokens | measured MiB | predicted MiB | off |\n|---|---|---|---|---|")


def activations(sizes: StepSizes, dtype: str) -> bool:
    """Lengths, then options at one length, on one rank."""
    heading()
    runtime, met = RuntimeConfig(dtype=dtype), True
    for tokens in (1024, 2048, 4096):
        longer = dataclasses.replace(sizes, tokens=tokens, tiles=tokens // 128)
        for name in ("nothing recomputed", "both recompute=full"):
            met &= compare(name, longer, RunConfig(runtime=runtime, **OPTIONS[name]), world_size=1)
    for name, sections in OPTIONS.items():
        met &= compare(name, sizes, RunConfig(runtime=runtime, **sections), world_size=1)
    tiles = dataclasses.replace(sizes, tokens=4096, tiles=200, layers=1)
    met &= compare(
        "200 tiles, 1 layer",
        tiles,
        RunConfig(runtime=runtime, **OPTIONS["model.recompute=full"]),
        world_size=1,
    )
    large_vocab = dataclasses.replace(sizes, tokens=1024, tiles=8, layers=1, vocab=32768)
    return met and compare(
        "vocabulary of 32768, 1 layer", large_vocab, RunConfig(runtime=runtime, **FULL), world_size=1
    )


def ranks(sizes: StepSizes, dtype: str) -> bool:
    """Layouts of two ranks."""
    heading()
    met, sizes = True, dataclasses.replace(sizes, tokens=2048, tiles=16, layers=2)
    for name, sections in RANKS.items():
        config = RunConfig(runtime=RuntimeConfig(dtype=dtype), **sections)
        micro_batches = 4 if config.parallel.pp > 1 else 1
        met &= compare(name, sizes, config, world_size=2, micro_batches=micro_batches)
    return met


def state(sizes: StepSizes, dtype: str) -> bool:
    """First, middle and last rank of layouts of published sizes."""
    print(
        "| size | ranks | rank | weights GiB | gradients GiB | optimizer GiB | | s |\n|---|---|---|---|---|---|---|---|"
    )
    met = True
    for size, world_size, parallel in STATES:
        config = RunConfig(parallel=parallel, runtime=RuntimeConfig(dtype="bfloat16"))
        plan = resolve(parallel, world_size)
        for rank in (0, world_size // 2 - 1, world_size - 1):
            started = time.perf_counter()
            found = compare_rank(config, parse_architecture(PUBLISHED[size]), plan=plan, rank=rank)
            seconds = time.perf_counter() - started
            parts = dataclasses.astuple(found.predicted)
            numbers = " | ".join(f"{part / 2**30:.3f}" for part in parts)
            verdict = "exact" if found.is_exact else f"BUILT {found.built}"
            print(f"| {size} | {world_size} | {rank} | {numbers} | {verdict} | {seconds:.1f} |", flush=True)
            met &= found.is_exact
    return met


PARTS = {"state": state, "activations": activations, "ranks": ranks}


def main() -> int:
    """Parse the command line, compare, say whether everything agreed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to compare; nothing means all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print(machine())
    missed = [name for name in options.parts or PARTS if not PARTS[name](StepSizes(), options.dtype)]
    print(f"MISSED: {', '.join(missed)}" if missed else "everything agreed")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
