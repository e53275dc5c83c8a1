"""Runs that are killed at any moment, and started again until they end: `tools/kill_runs.py`.

    undisturbed run --losses, gradient norms--> equal, to the last bit <-- run, SIGKILL, run, SIGKILL, ..., run

Every source of randomness is on: drop path, adapter dropout, random strides, a loader process. A run is killed at a
random moment of its start-up, its steps or its saves; only what it has on disk survives.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import tiny
from tests.support.warm import run_verb, started_verb

STEPS = 8
RANDOMNESS = (
    "vision.drop_path_rate=0.4",
    "lora.language_rank=4",
    "lora.vision_rank=4",
    "lora.projector_rank=4",
    "lora.dropout=0.3",
    "data.num_workers=1",
    f"optim.steps={STEPS}",
    "optim.warmup_steps=1",
    "checkpoint.save_every=2",
)


@dataclass(kw_only=True)
class KillReport:
    """What became of the runs.

    Attributes:
        kills: processes that were killed before they ended.
        runs: that were started again until they ended.
        at_step: steps that were on disk at each kill -> number of kills; 0 is start-up of the first start.
        failures: runs that did not end, or not with the undisturbed curve.
    """

    kills: int = 0
    runs: int = 0
    at_step: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line, and one for each failure."""
        steps = ", ".join(f"{step}: {count}" for step, count in sorted(self.at_step.items()))
        head = f"{self.kills} kills in {self.runs} runs of {STEPS} steps; {len(self.failures)} failures"
        return "\n".join([f"{head}\nkills by steps done: {steps}", *self.failures])


def kill_runs(
    root: Path, *, count: int, seed: int, ranks: int = 1, on_run: Callable[[KillReport], None] | None = None
) -> KillReport:
    """Kill runs `count` times, and compare each with the undisturbed one.

    Args:
        root: an empty folder.
        count: kills.
        seed: of the moments.
        ranks: processes of a run; all are killed together.
        on_run: called when a run has ended.
    """
    config = tiny.prepared(root, run="whole")
    run_verb("--version")  # the server imports once, which is no part of a run's time
    begin = time.monotonic()
    _run(config, root / "whole", ranks=ranks, limit=600.0)
    usual = time.monotonic() - begin
    wanted = tiny.curve(root / "whole")
    assert len(wanted) == STEPS, f"the undisturbed run made {len(wanted)} steps"
    moments, report = random.Random(seed), KillReport()
    while report.kills < count and not report.failures:
        run_dir = root / f"run_{report.runs}"
        report.runs += 1
        problem = _killed_and_ended(config, run_dir, report, moments, ranks=ranks, count=count, usual=usual)
        if not problem and tiny.curve(run_dir) != wanted:
            problem = f"losses or norms differ: {tiny.curve(run_dir)}, not {wanted}"
        if problem:
            report.failures.append(f"{run_dir}: {problem}")
        if on_run:
            on_run(report)
    return report


def _killed_and_ended(
    config: Path,
    run_dir: Path,
    report: KillReport,
    moments: random.Random,
    *,
    ranks: int,
    count: int,
    usual: float,
) -> str:
    """Start a run until it ends, killing it up to eight times; what is wrong, if anything."""
    for _ in range(8):
        if report.kills == count:
            break
        ended = _run(config, run_dir, ranks=ranks, limit=moments.uniform(0.0, usual))
        if ended is not None:
            return ended
        report.kills += 1
        steps = _steps(run_dir)
        report.at_step[steps] = report.at_step.get(steps, 0) + 1
    ended = _run(config, run_dir, ranks=ranks, limit=600.0)
    return "did not end within 600 s" if ended is None else ended


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _run(config: Path, run_dir: Path, *, ranks: int, limit: float) -> str | None:
    """Run for at most `limit` seconds; None when it was killed, else how it failed or an empty string."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("train", config, *RANDOMNESS, f"runtime.run_dir={run_dir}")
        processes = started_verb(*arguments, ranks=ranks, folder=folder)
        end = time.monotonic() + limit
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            time.sleep(0.005)
        was_running = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        if was_running:
            return None
        codes = [process.exitcode for process in processes]
        texts = [path.read_text(errors="replace")[-2000:] for path in sorted(Path(folder).glob("stderr_*"))]
    return f"ended with {codes}:\n" + "\n".join(texts) if any(codes) else ""
