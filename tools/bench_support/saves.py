"""How long training waits for checkpoints, and what a write beside it costs; for bench_run.py.

    rounds of:  10 steps without a save | 10 and a save that training waits for | 10 and a save in the background

Blocks take turns, so that other work on the machine falls on all of them. A step is the package's own `train_step` of a
model with random weights on one pack again and again, long enough to take about as long as asked for; saves go through
the package's own `Saver`. Two clocks: wall time, and the processor time of the thread that trains, which says what an
idle machine would need (waiting for a disk is in the first only).
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_v2pe.assembly.optim.optimizer import build_trainer
from megatron_v2pe.checkpoint.files.weights_layout import write_layout
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.config.schema import CheckpointConfig, OptimConfig, RunConfig, RuntimeConfig
from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes
from megatron_v2pe.train.saving import Saver
from megatron_v2pe.train.step import train_step

EVERY = 10
TARGET = 0.05
MODES = ("none", "waiting", "background")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Ten steps.

    Attributes:
        steps_s: wall time of the steps themselves.
        steps_cpu_s: processor time of the training thread in them.
        stall_s: wall time between them that went to the checkpoint.
        stall_cpu_s: processor time of the training thread in that.
    """

    steps_s: float
    steps_cpu_s: float
    stall_s: float
    stall_cpu_s: float


def measure(work: str, hidden: int, layers: int, step_seconds: float, rounds: int) -> dict[str, Any]:
    """Blocks of each mode on this rank; the body of a process.

    Args:
        work: folder for the checkpoints.
        hidden: of the decoder.
        layers: of the decoder.
        step_seconds: about how long a step shall take.
        rounds: blocks of each mode.
    """
    sizes = StepSizes(hidden=hidden, layers=layers, vocab=4096, heads=8, kv_heads=4, tokens=256, tiles=2)
    config = RunConfig(runtime=RuntimeConfig(dtype="float32"), optim=OptimConfig(steps=10**6))
    once = _seconds(_Training(sizes, config))
    tokens = min(16384, max(128, int(sizes.tokens * step_seconds / once)))
    training = _Training(replace(sizes, tokens=tokens), config)
    _hugging_face_folder(Path(work) / "hf", training.step.sizes)
    savers = {mode: _saver(training, Path(work), mode) for mode in MODES if mode != "none"}
    blocks: dict[str, list[Block]] = {mode: [] for mode in MODES}
    for number in range(rounds + 1):
        for mode in MODES:
            block = _block(training, savers.get(mode), number=number)
            if number:  # the first round touches memory for the first time
                blocks[mode].append(block)
    gradients = sum(p.numel() for p in training.trainer.model_chunks[0].parameters())
    return {"tokens": tokens, "parameters": gradients, "blocks": blocks}


class _Training:
    """A model, its optimizer and one pack."""

    def __init__(self, sizes: StepSizes, config: RunConfig) -> None:
        self.config = config
        self.step = MeasuredStep(config=config, sizes=sizes, dp=dist.get_world_size())
        wrapped = self.step.wrapped
        self.trainer = build_trainer([wrapped[0].module], wrapped, config)

    def __call__(self) -> None:
        train_step(self.trainer, self.step.runner, [self.step.batch], ranks=self.step.ranks)


def _seconds(training: _Training) -> float:
    """Processor time of a step after one that warms up: the wall time of an idle machine."""
    training()
    started = time.thread_time()
    training()
    return time.thread_time() - started


def _saver(training: _Training, work: Path, mode: str) -> Saver:
    checkpoint = CheckpointConfig(save_every=EVERY, keep=1, async_save=mode == "background")
    runtime = replace(training.config.runtime, run_dir=str(work / mode))
    config = replace(training.config, checkpoint=checkpoint, runtime=runtime)
    return Saver(config, training.trainer, ranks=training.step.ranks, hf_folder=work / "hf")


def _block(training: _Training, saver: Saver | None, *, number: int) -> Block:
    """Ten steps; a save falls due after the first."""
    steps_s, steps_cpu_s, stall_s, stall_cpu_s = 0.0, 0.0, 0.0, 0.0
    for step in range(number * EVERY, (number + 1) * EVERY):
        started, started_cpu = time.perf_counter(), time.thread_time()
        training()
        stopped, stopped_cpu = time.perf_counter(), time.thread_time()
        steps_s, steps_cpu_s = steps_s + stopped - started, steps_cpu_s + stopped_cpu - started_cpu
        if saver is not None:
            state = RunState(step=step, consumed_packs=0, data_seed=0, data_hash="")
            if step:  # step 0 is no step of a run
                saver.after_step(state, is_interrupted=False)
            stall_s += time.perf_counter() - stopped
            stall_cpu_s += time.thread_time() - stopped_cpu
    return Block(steps_s=steps_s, steps_cpu_s=steps_cpu_s, stall_s=stall_s, stall_cpu_s=stall_cpu_s)


def _hugging_face_folder(folder: Path, sizes: StepSizes) -> None:
    """What a save copies from it: the model's config.json, and that no weights lie in files."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(sizes.hugging_face()), encoding="utf-8")
        write_layout(folder, [])


def report(ranks: list[dict[str, Any]]) -> bool:
    """Print the table; whether the target is met. The slowest rank counts."""
    first = ranks[0]
    print(
        f"{first['parameters'] / 1e6:.1f} M parameters a rank, float32 with Adam: "
        f"{16 * first['parameters'] / 2**20:.0f} MiB of state; packs of {first['tokens']} tokens"
    )
    wall = _median(ranks, "none", lambda block: block.steps_s)
    cpu = _median(ranks, "none", lambda block: block.steps_cpu_s)
    print(f"{EVERY} steps without a save: {wall:.2f} s, {cpu:.2f} s of processor time (medians of blocks)")
    print(
        "save            waited      of 10 steps   processor time   of 10 steps   of one   steps beside it (cpu)"
    )
    shares = {}
    for mode in MODES[1:]:
        stall = _median(ranks, mode, lambda block: block.stall_s)
        stall_cpu = _median(ranks, mode, lambda block: block.stall_cpu_s)
        beside = _median(ranks, mode, lambda block: block.steps_cpu_s) / cpu
        shares[mode] = stall_cpu / cpu
        print(
            f"{mode:<12} {stall:10.3f} s   {stall / wall:11.2%}   {stall_cpu:12.3f} s   {stall_cpu / cpu:11.2%}   "
            f"{EVERY * stall_cpu / cpu:6.1%}   {beside:10.2f}x"
        )
    met = shares["background"] < TARGET
    print(f"target: in the background under {TARGET:.0%} of the steps: {'met' if met else 'MISSED'}")
    return met


def _median(ranks: list[dict[str, Any]], mode: str, of: Any) -> float:
    return max(statistics.median(of(block) for block in rank["blocks"][mode]) for rank in ranks)
