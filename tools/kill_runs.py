"""Kill runs at random moments and start them again: do they end with the losses of an undisturbed run, bit for bit?

    python tools/kill_runs.py --count 100
    python tools/kill_runs.py --count 20 --ranks 2

Drop path, adapter dropout, random strides and a loader process are on. Exit code 1 when a run ended otherwise; its
folder is then kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from tests.support.kills import KillReport


def main() -> int:
    """Run; 1 when any run ended otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="kills (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (default 0)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of a run (default 1)")
    args = parser.parse_args()
    from tests.support.kills import kill_runs  # imports torch

    root = Path(tempfile.mkdtemp(prefix="kills-"))
    report = kill_runs(root, count=args.count, seed=args.seed, ranks=args.ranks, on_run=_say)
    sys.stdout.write(report.text() + "\n")
    if report.failures:
        sys.stdout.write(f"kept: {root}\n")
        return 1
    shutil.rmtree(root)
    return 0


def _say(report: KillReport) -> None:
    sys.stderr.write(f"{report.kills} kills in {report.runs} runs, {len(report.failures)} failures\n")


if __name__ == "__main__":
    sys.exit(main())
