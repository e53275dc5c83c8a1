"""Training tokens per second of the quickstart's model: one rank against two that share each sequence.

    python tools/bench_train.py                  12 steps of 4096-token packs on 1 rank and on cp 2, about two minutes
    python tools/bench_train.py --steps 30 --work FOLDER      keeps checkpoint, data and runs

Makes the quickstart's checkpoint and a small set of its data, then calls `megatron-v2pe train` as a user would: data
loading, optimizer and metrics included. Both sides compute with one thread per rank, so cp 2 has twice the cores; 2.0x
would be perfect. The result is the ratio of the median step, on an idle machine; the first steps warm up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
WARM_UP_STEPS = 2


def call(*arguments: str | Path) -> None:
    """Run a Python program with one thread; its output is shown when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-4000:]}")


def prepare(work: Path) -> None:
    """Checkpoint and data; parts that exist are kept."""
    if not (work / "hf").exists():
        call(QUICKSTART / "make_checkpoint.py", work / "hf")
    if not (work / "data").exists():
        data = ("--tokens-per-length", "40000", "--eval-share", "0.01")
        call(QUICKSTART / "make_data.py", work / "data", "--checkpoint", work / "hf", *data)
    if not (work / "imported").exists():
        call("-m", "megatron_v2pe", "import-hf", work / "hf", work / "imported")


def train(work: Path, *, cp: int, steps: int) -> list[dict[str, float]]:
    """Metrics of each step of a fresh run after the warm-up."""
    with tempfile.TemporaryDirectory(dir=work) as run_dir:
        overrides = [
            f"model.checkpoint={work / 'imported'}",
            f"data.meta={work / 'data' / 'train_meta.json'}",
            f"data.cache_dir={work / 'cache'}",
            "data.curriculum=[]",  # all lengths from the first step on
            f"runtime.run_dir={run_dir}",
            "runtime.tensorboard=false",
            f"parallel.cp={cp}",
            f"optim.steps={steps}",
            "optim.warmup_steps=0",
        ]
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp)] if cp > 1 else []
        )
        call(*launcher, "-m", "megatron_v2pe", "train", QUICKSTART / "train.yaml", *overrides)
        lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines][WARM_UP_STEPS:]


def rate(lines: list[dict[str, float]]) -> float:
    """Tokens per second of the median step."""
    return statistics.median(line["tokens_per_s"] for line in lines)


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> int:
    """Parse the command line, train both ways, print rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=12, help=f"steps of each run, {WARM_UP_STEPS} to warm up"
    )
    parser.add_argument("--work", type=Path, help="folder to keep; otherwise a temporary one")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps is {options.steps}, but the first {WARM_UP_STEPS} only warm up")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread per rank, float32")
    rates = {}
    with work_folder(options.work) as work:
        prepare(work)
        for cp in (1, 2):
            lines = train(work, cp=cp, steps=options.steps)
            rates[cp] = rate(lines)
            seconds = statistics.median(line["step_s"] for line in lines)
            waits = statistics.median(line["data_s"] for line in lines)
            print(
                f"cp {cp}: {rates[cp]:,.0f} tokens/s, step {seconds:.2f} s, waiting for data {waits:.2f} s",
                flush=True,
            )
    print(f"cp 2 against one rank: {rates[2] / rates[1]:.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
