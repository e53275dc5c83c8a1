"""What a run folder tells afterwards, in words and curves; two of them side by side.

    metrics.jsonl, bad_steps.jsonl, stacks/, checkpoints/ --summarize--> RunSummary --> table on stdout, PNG of curves
                                     '--read_hangs--> a line for each hang: who waited where, for whom

A step that took more than three times the median counts as a stall: a slow disk, a checkpoint, a neighbour.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.evaluation.hangs import Hang, read_hangs
from megatron_v2pe.evaluation.report import pyplot, save_figure

_STALL_FACTOR = 3.0
_NEEDED = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "data_s")
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Numbers of one run.

    Attributes:
        run_dir: its folder.
        lines: metrics by step.
        stalls: steps that took more than three times the median, waits for data included.
        bad_steps: steps that were not applied.
        hangs: who waited where, each time that it hung.
        stacks: ranks that have written stacks.
        checkpoints: steps of the checkpoints that are there.
        starts: step behind which the run was started, each time.
    """

    run_dir: Path
    lines: tuple[dict[str, Any], ...]
    stalls: tuple[int, ...]
    bad_steps: tuple[int, ...]
    hangs: tuple[Hang, ...]
    stacks: tuple[int, ...]
    checkpoints: tuple[int, ...]
    starts: tuple[int, ...]

    def rows(self) -> dict[str, str]:
        """Label to text, in the order of the table."""
        losses = [(line["loss"], line["step"]) for line in self.lines if line["loss"] is not None]
        rates = [line["tokens_per_s"] for line in self.lines]
        waits = sum(line["data_s"] for line in self.lines)
        seconds = waits + sum(line["step_s"] for line in self.lines)
        lowest = min(losses) if losses else (float("nan"), 0)
        return {
            "steps": f"{self.lines[0]['step']} to {self.lines[-1]['step']}",
            "loss first": f"{losses[0][0]:.4f}" if losses else "none",
            "loss last": f"{losses[-1][0]:.4f}" if losses else "none",
            "loss lowest": f"{lowest[0]:.4f} at step {lowest[1]}" if losses else "none",
            "tokens": f"{sum(line['tokens'] for line in self.lines):,}",
            "tokens/s, median": f"{statistics.median(rates):,.0f}",
            "time in steps": f"{seconds:,.1f} s, {100 * waits / seconds:.1f} % of it waiting for data",
            "starts": _named(self.starts, "behind step"),
            "stalls": _named(self.stalls, "step"),
            "steps not applied": _named(self.bad_steps, "step"),
            "hangs": _named([hang.step for hang in self.hangs], "step"),
            "stacks": _named(self.stacks, "rank"),
            "checkpoints": _named(self.checkpoints, "step"),
        }


def summarize(run_dir: str | Path) -> RunSummary:
    """Read a run folder.

    Raises:
        DataError: it has no metrics, or lines that are none.
    """
    run_dir = Path(run_dir)
    try:
        lines = tuple(_checked(run_dir / "metrics.jsonl"))
    except DataError as error:
        raise DataError("\n".join([str(error), *map(str, read_hangs(run_dir))])) from None
    seconds = [line["step_s"] + line["data_s"] for line in lines]
    limit = _STALL_FACTOR * statistics.median(seconds)
    bad, starts = run_dir / "bad_steps.jsonl", run_dir / "starts.jsonl"
    return RunSummary(
        run_dir=run_dir,
        lines=lines,
        stalls=tuple(line["step"] for line, each in zip(lines, seconds, strict=True) if each > limit),
        bad_steps=tuple(sorted({line["step"] for _, line in read_jsonl(bad)})) if bad.exists() else (),
        hangs=read_hangs(run_dir),
        stacks=_numbers(run_dir.glob("stacks/rank_*.txt")),
        checkpoints=_numbers(path.parent for path in run_dir.glob("checkpoints/step_*/checkpoint.json")),
        starts=tuple(line["step"] for _, line in read_jsonl(starts)) if starts.exists() else (),
    )


def table(runs: Sequence[RunSummary]) -> str:
    """One column for each run; below it who waited for whom in hangs, below two of them where their losses part."""
    columns = [run.rows() for run in runs]
    names = [str(run.run_dir) for run in runs]
    width = max(len(label) for label in columns[0]) + 2
    widths = [max(len(name), *map(len, rows.values())) for name, rows in zip(names, columns, strict=True)]
    text = [["run", *names], *([label, *(rows[label] for rows in columns)] for label in columns[0])]
    lines = [
        f"{label:<{width}}" + "  ".join(f"{cell:<{size}}" for cell, size in zip(cells, widths, strict=True))
        for label, *cells in text
    ]
    prefixes = [f"{name}: " if len(runs) == 2 else "" for name in names]
    lines += [f"{prefix}{hang}" for prefix, run in zip(prefixes, runs, strict=True) for hang in run.hangs]
    if len(runs) == 2:
        lines.append(f"{'losses':<{width}}{_parting(*runs)}")
    return "".join(line.rstrip() + "\n" for line in lines)


def draw_curves(runs: Sequence[RunSummary], out: Path) -> None:
    """Loss, gradient norm, learning rate and tokens/s over steps as PNG; steps without a number are gaps.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    figure = pyplot().figure(figsize=(12, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        for run in runs:
            values = [float("nan") if line[name] is None else line[name] for line in run.lines]
            axes.plot([line["step"] for line in run.lines], values, label=run.run_dir.name, linewidth=1)
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, out)


def _parting(first: RunSummary, second: RunSummary) -> str:
    """Whether the losses of steps that both runs have are equal, and where and how far they part."""
    other = {line["step"]: line["loss"] for line in second.lines}
    both = [
        (line["step"], line["loss"], other[line["step"]]) for line in first.lines if line["step"] in other
    ]
    if not both:
        return "no step is in both runs"
    apart = [(step, mine, its) for step, mine, its in both if mine != its]
    if not apart:
        return f"equal to the bit at all {len(both)} steps of both"
    gaps = [abs(mine - its) for _, mine, its in apart if mine is not None and its is not None]
    largest = f"; largest difference {max(gaps):.3g}" if gaps else ""
    return f"differ at {len(apart)} of {len(both)} steps, first at step {apart[0][0]}{largest}"


def _checked(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in read_jsonl(path):
        if missing := [name for name in _NEEDED if name not in line]:
            raise DataError(f"{path}:{number}: not a line of training metrics, it lacks {', '.join(missing)}")
        lines.append(line)
    if not lines:
        raise DataError(f"{path}: holds no step; did the run start?")
    return lines


def _numbers(paths: Any) -> tuple[int, ...]:
    return tuple(sorted(int(path.stem.rsplit("_", 1)[1]) for path in paths))


def _named(numbers: Sequence[int], what: str) -> str:
    if not numbers:
        return "none"
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f"{len(numbers)}: {what} {', '.join(map(str, numbers[:6]))}{more}"
