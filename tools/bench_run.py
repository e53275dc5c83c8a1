"""What a run costs besides training: checkpoints, logging and guards, and the start.

    python tools/bench_run.py saves       stall of a save that training waits for and of one in the background, every 10
                                          steps of about a second, against steps without saves; --ranks 2 for dp 2
    python tools/bench_run.py guards      metrics, sinks, heartbeats, watchdog, interruption, bad steps: per step
    python tools/bench_run.py start-up    seconds from the start of the process to the end of the first step, by phase
    python tools/bench_run.py             all of them, about five minutes on two idle cores

How to read it. `saves` gives wall time and the processor time of the training thread; shares are of the time of ten
steps (the target, under 5 %) and of one. `guards` gives processor time of all threads, and wall time, as shares of a
step of one second (target: under 1 %); a run on several ranks has three small collectives per step more.
`start-up` reads start_up.json, which every run writes; a fresh run measures its data, a resumed one loads a checkpoint.
Shares of processor time hold on a machine that others use too; measure wall times on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench_support import guards as guarding
from bench_support import saves as saving
from bench_support.step import machine, on_ranks
from bench_train import QUICKSTART, call, prepare, work_folder

STEP_SECONDS = 1.0


def saves(work: Path, options: argparse.Namespace) -> bool:
    """Stall of saves."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        sizes = (options.hidden, options.layers, options.step_seconds, options.rounds)
        return saving.report(on_ranks(saving.measure, options.ranks, folder, *sizes))


def run_overrides(work: Path, run_dir: str) -> list[str]:
    """The quickstart's run on one rank, with everything that monitors and logs."""
    return [
        f"model.checkpoint={work / 'imported'}",
        f"data.meta={work / 'data' / 'train_meta.json'}",
        f"runtime.run_dir={run_dir}",
        "parallel.cp=1",
        "runtime.tensorboard=true",
        "checkpoint.save_every=0",
        "optim.warmup_steps=0",
    ]


def guards(work: Path, options: argparse.Namespace) -> bool:
    """Logging and guards."""
    prepare(work)
    with tempfile.TemporaryDirectory(dir=work) as run_dir:
        cost = guarding.measure(QUICKSTART / "train.yaml", run_overrides(work, run_dir), steps=options.steps)
    share = cost.processor_s / STEP_SECONDS
    print(
        f"around a step: {1e3 * cost.processor_s:.2f} ms of processor time, {1e3 * cost.wall_s:.2f} ms of wall time; "
        f"{share:.2%} and {cost.wall_s / STEP_SECONDS:.2%} of a step of {STEP_SECONDS:g} s"
    )
    print(f"target: under 1 % of a step of a second: {'met' if share < 0.01 else 'MISSED'}")
    return share < 0.01


def start_up(work: Path, options: argparse.Namespace) -> bool:
    """Phases up to the end of the first step."""
    prepare(work)
    starts: dict[str, list[dict[str, float]]] = {"fresh": [], "resumed": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=work) as run_dir:
            for number, kind in enumerate(starts, start=1):
                steps = [f"optim.steps={number}", "data.num_workers=1"]
                command = ("-m", "megatron_v2pe", "train", QUICKSTART / "train.yaml")
                call(*command, *run_overrides(work, run_dir), *steps)
                written = (Path(run_dir) / "start_up.json").read_text(encoding="utf-8")
                starts[kind].append(json.loads(written)["seconds"])
    for kind, phases in starts.items():
        middle = {name: statistics.median(start[name] for start in phases) for name in phases[0]}
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in middle.items())
        print(f"{kind}: {sum(middle.values()):.2f} s to the end of the first step: {parts}", flush=True)
    return True


PARTS = {"saves": saves, "guards": guards, "start-up": start_up}


def main() -> int:
    """Parse the command line, measure, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="?", choices=PARTS, help="one of the three; all when omitted")
    parser.add_argument("--ranks", type=int, default=1, help="saves: data parallel ranks")
    parser.add_argument("--hidden", type=int, default=512, help="saves: width of the decoder")
    parser.add_argument("--layers", type=int, default=8, help="saves: layers of the decoder")
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS, help="saves: aimed at by tokens")
    parser.add_argument("--rounds", type=int, default=3, help="saves: blocks of ten steps of each kind")
    parser.add_argument("--steps", type=int, default=500, help="guards: steps that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="start-up: starts of each kind")
    parser.add_argument("--work", type=Path, help="folder to keep; otherwise a temporary one")
    options = parser.parse_args()
    for name in ("ranks", "rounds", "steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, but must be at least 1")
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")  # of the processes that are started
    met = True
    with work_folder(options.work) as work:
        for part in [options.what] if options.what else PARTS:
            print(f"{part}: {machine()}", flush=True)
            met = PARTS[part](work, options) and met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
