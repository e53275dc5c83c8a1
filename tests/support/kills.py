"""Runs that are killed at any moment, and started again until they end: `tools/kill_runs.py`.

    undisturbed run --losses, gradient norms--> equal, to the last bit <-- run, SIGKILL, run, SIGKILL, ..., run

Every source of randomness is on: drop path, adapter dropout, random strides, a loader process. A run is killed in its
start-up (one kill of five), or a random moment after one of its next steps, which may be in a save (every second
step is saved, beside the next one); only what it has on disk survives.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import tiny
from tests.support.warm import started_verb

STEPS = 12
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
        at_step: steps that were done at each kill, of all starts of its run -> number of kills.
        in_start_up: kills before the first step of a start.
        failures: runs that did not end, or not with the undisturbed curve.
    """

    kills: int = 0
    runs: int = 0
    at_step: dict[int, int] = field(default_factory=dict)
    in_start_up: int = 0
    failures: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line, and one for each failure."""
        steps = ", ".join(f"{step}: {count}" for step, count in sorted(self.at_step.items()))
        head = f"{self.kills} kills in {self.runs} runs of {STEPS} steps; {len(self.failures)} failures"
        where = f"kills by steps done: {steps}; {self.in_start_up} of them before the first step of a start"
        return "\n".join([head, where, *self.failures])


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
    _run(config, root / "whole", ranks=ranks)
    wanted = tiny.curve(root / "whole")
    assert len(wanted) == STEPS, f"the undisturbed run made {len(wanted)} steps"
    moments, report = random.Random(seed), KillReport()
    while report.kills < count and not report.failures:
        run_dir = root / f"run_{report.runs}"
        report.runs += 1
        problem = _killed_and_ended(config, run_dir, report, moments, ranks=ranks, count=count)
        if not problem and tiny.curve(run_dir) != wanted:
            problem = f"losses or norms differ: {tiny.curve(run_dir)}, not {wanted}"
        if problem:
            report.failures.append(f"{run_dir}: {problem}")
        if on_run:
            on_run(report)
    return report


def _killed_and_ended(
    config: Path, run_dir: Path, report: KillReport, moments: random.Random, *, ranks: int, count: int
) -> str:
    """Start a run until it ends, killing it up to twenty times; what is wrong, if anything."""
    for _ in range(20):
        if report.kills == count:
            break
        new_steps = 0 if moments.random() < 0.2 else moments.randint(1, 4)
        moment = Moment(new_steps=new_steps, seconds=moments.uniform(0.0, 2.0 if new_steps == 0 else 0.4))
        ended = _run(config, run_dir, ranks=ranks, moment=moment)
        if ended is not None:
            return ended
        report.kills += 1
        report.in_start_up += new_steps == 0
        steps = _steps(run_dir)
        report.at_step[steps] = report.at_step.get(steps, 0) + 1
    ended = _run(config, run_dir, ranks=ranks)
    return "did not end" if ended is None else ended


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: so many seconds after that many steps of this start, 0 for the start itself."""

    new_steps: int
    seconds: float


def _steps(run_dir: Path) -> int:
    """Steps in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _saved(run_dir: Path) -> int:
    """The step that the next start continues from."""
    latest = run_dir / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def _run(config: Path, run_dir: Path, *, ranks: int, moment: Moment | None = None) -> str | None:
    """Run to the end or the moment; None when it was killed, else how it failed or an empty string."""
    first = _saved(run_dir)
    begin = time.time()
    metrics = run_dir / "metrics.jsonl"
    with tempfile.TemporaryDirectory() as outputs:
        arguments = ("train", config, *RANDOMNESS, f"runtime.run_dir={run_dir}")
        processes = started_verb(*arguments, ranks=ranks, outputs=outputs)
        kill_at, limit = float("inf"), time.monotonic() + 600.0
        while any(process.is_alive() for process in processes) and time.monotonic() < min(kill_at, limit):
            time.sleep(0.003)
            if moment is not None and kill_at == float("inf"):
                is_own = metrics.exists() and metrics.stat().st_mtime >= begin
                reached = _steps(run_dir) - first if is_own else 0
                if reached >= moment.new_steps:
                    kill_at = time.monotonic() + moment.seconds
        was_running = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        if was_running:
            assert moment is not None, "did not end within 600 s"
            return None
        codes = [process.exitcode for process in processes]
        texts = [path.read_text(errors="replace")[-2000:] for path in sorted(Path(outputs).glob("stderr_*"))]
    return f"ended with {codes}:\n" + "\n".join(texts) if any(codes) else ""
