"""One line for each target, alike in all benchmarks: met or not, what, how much, and how much was wanted."""

from __future__ import annotations

import os


def verdict(what: str, figure: str, *, target: str, is_met: bool) -> None:
    """Print `pass` or `FAIL` with the figure and its target."""
    print(f"{'pass' if is_met else 'FAIL'}  {what}: {figure} (target {target})", flush=True)


def show_load() -> None:
    """Say how busy the machine is; wall times mean something on idle cores only."""
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
