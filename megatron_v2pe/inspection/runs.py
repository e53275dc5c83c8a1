"""What a run folder holds, read once; `run_table` prints it, `run_curves` draws it.

    metrics.jsonl, bad_steps.jsonl, stacks/, checkpoints/ --read_run--> RunRecord --> table on stdout, PNG of curves
                                     '--read_hangs--> a line for each hang: who waited where, for whom

A step that took more than three times the median counts as a stall: a slow disk, a checkpoint, a neighbour.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.inspection.hangs import Hang, read_hangs

_STALL_FACTOR = 3.0
_NEEDED = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run has recorded.

    Attributes:
        run_dir: its folder.
        lines: metrics by step.
        stalls: steps that took more than three times the median, waits for data included.
        bad_steps: steps that were not applied.
        hangs: who waited where, each time that it hung.
        stacks: ranks that have written stacks.
        checkpoints: steps of the checkpoints that are there.
        starts: step after which the run was started, each time.
    """

    run_dir: Path
    lines: tuple[dict[str, Any], ...]
    stalls: tuple[int, ...] = ()
    bad_steps: tuple[int, ...] = ()
    hangs: tuple[Hang, ...] = ()
    stacks: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: it has no metrics, or lines that are not metrics; names the hangs of the run, if any.
    """
    run_dir = Path(run_dir)
    try:
        lines = read_metrics(run_dir / "metrics.jsonl", needed=_NEEDED)
    except DataError as error:
        raise DataError("\n".join([str(error), *map(str, read_hangs(run_dir))])) from None
    seconds = [line["step_s"] + line["data_s"] for line in lines]
    limit = _STALL_FACTOR * statistics.median(seconds)
    bad, starts = run_dir / "bad_steps.jsonl", run_dir / "starts.jsonl"
    return RunRecord(
        run_dir=run_dir,
        lines=lines,
        stalls=tuple(line["step"] for line, each in zip(lines, seconds, strict=True) if each > limit),
        bad_steps=tuple(sorted({line["step"] for _, line in read_jsonl(bad)})) if bad.exists() else (),
        hangs=read_hangs(run_dir),
        stacks=_numbers(run_dir.glob("stacks/rank_*.txt")),
        checkpoints=_numbers(path.parent for path in run_dir.glob("checkpoints/step_*/checkpoint.json")),
        starts=tuple(line["step"] for _, line in read_jsonl(starts)) if starts.exists() else (),
    )


def read_metrics(path: str | Path, *, needed: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Lines of a `metrics.jsonl`, one for each step.

    Raises:
        DataError: no such file, no step in it, or a line without one of the `needed` numbers.
    """
    lines = []
    for number, line in read_jsonl(path, skip_cut=True):
        if missing := [name for name in needed if name not in line]:
            raise DataError(f"{path}:{number}: not a line of training metrics, it lacks {', '.join(missing)}")
        lines.append(line)
    if not lines:
        raise DataError(f"{path}: holds no step; did the run start?")
    return tuple(lines)


def _numbers(paths: Iterable[Path]) -> tuple[int, ...]:
    return tuple(sorted(int(path.stem.rsplit("_", 1)[1]) for path in paths))
