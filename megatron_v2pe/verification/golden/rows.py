"""One line of `check-golden`: a case, a quantity, how far it is off, and the verdict.

A group is a module of `groups/` with

    def run(folder: Path, *, family: str | None) -> Iterator[Row]

that goes through the package's public code only and yields one row per case and quantity. Groups of the model
(`model`, `generation`) also have the argument `parallel: ParallelConfig`, are run on every rank, and must yield the
same rows on each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "unsupported"]


@dataclass(frozen=True)
class Row:
    """Result of one quantity of one case.

    Attributes:
        name: group and case, such as `positions/tiles64_s16`.
        quantity: what was compared, such as `logits`.
        error: largest absolute deviation; None where equality has no size (hashes, ids) and it failed, or
            where nothing was run.
        tolerance: largest deviation that passes; None where nothing was run.
        status: `unsupported` says that the case could not be run, `detail` says why.
        detail: reason of a failure or of a case that was not run.
    """

    name: str
    quantity: str
    error: float | None
    tolerance: float | None
    status: Status
    detail: str = ""


def compared(name: str, quantity: str, *, error: float, tolerance: float, detail: str = "") -> Row:
    """Row of a measured deviation; passes at or below the tolerance, and never for NaN."""
    status: Status = "pass" if error <= tolerance else "fail"
    return Row(name=name, quantity=quantity, error=error, tolerance=tolerance, status=status, detail=detail)


def equal(name: str, quantity: str, *, is_equal: bool, detail: str) -> Row:
    """Row of an exact comparison; `detail` is kept for failures only."""
    return Row(
        name=name,
        quantity=quantity,
        error=0.0 if is_equal else None,
        tolerance=0.0,
        status="pass" if is_equal else "fail",
        detail="" if is_equal else detail,
    )


def unsupported(name: str, quantity: str, *, reason: str) -> Row:
    """Row of a case that this version cannot run."""
    return Row(name=name, quantity=quantity, error=None, tolerance=None, status="unsupported", detail=reason)


def format_row(row: Row) -> str:
    """Name, quantity, max abs error, tolerance, status, and the detail where there is one."""
    error = "-" if row.error is None or math.isnan(row.error) else f"{row.error:.3e}"
    tolerance = "-" if row.tolerance is None else f"{row.tolerance:.1e}"
    line = f"{row.name:<56} {row.quantity:<32} {error:>10} {tolerance:>8}  {row.status}"
    return f"{line}  {row.detail}" if row.detail else line


def format_counts(rows: Iterable[Row]) -> str:
    """Last line of the report."""
    counts = Counter(row.status for row in rows)
    return f"{counts['pass']} pass, {counts['fail']} fail, {counts['unsupported']} unsupported"


def exit_code(rows: Iterable[Row]) -> int:
    """1 when any row failed, 2 when none failed but some could not be run, else 0."""
    statuses = {row.status for row in rows}
    return 1 if "fail" in statuses else 2 if "unsupported" in statuses else 0
