"""The words of `check-data`: one line a file, with its count against the published one."""

from __future__ import annotations

from pathlib import Path

from megatron_v2pe.evaluation.benchmarks.base import Benchmark, FileCheck

_SHOWN_MISSING = 3


def check_text(benchmark: Benchmark, root: Path, *, is_required: bool) -> tuple[str, bool]:
    """What of a benchmark is below a folder.

    Args:
        benchmark: whose files are looked for.
        root: looked in, and in its folder of the benchmark's name.
        is_required: a benchmark without any file is a problem.

    Returns:
        Text, and whether nothing is wrong.
    """
    checks: list[FileCheck] = []
    for folder in (root / benchmark.name, root):
        checks = benchmark.check(folder)
        if any(check.count is not None for check in checks):
            break
    there = [check for check in checks if check.count is not None]
    absent = [check for check in checks if check.count is None]
    lines = [f"{benchmark.title} ({benchmark.name}): {len(there)} of {len(checks)} files"]
    lines += [f"  {_line(check)}" for check in there]
    lines += [f"  {check.path}: missing" for check in absent[:_SHOWN_MISSING]]
    if len(absent) > _SHOWN_MISSING:
        lines.append(f"  and {len(absent) - _SHOWN_MISSING} more are missing")
    if absent:
        lines.append(f"  download: {benchmark.download}")
    is_fine = not any(check.problem for check in there) and (bool(there) or not is_required)
    return "\n".join(lines), is_fine


def _line(check: FileCheck) -> str:
    count = f"{check.count} questions"
    if check.published is None:
        count += " (the published number is not known)"
    elif check.published == check.count:
        count += ", as published"
    else:
        count += f", {check.published} were published"
    return f"{check.path}: {count}" + (f"\n    problem: {check.problem}" if check.problem else "")
