"""Hand in damaged and hostile input, and look at how it ends: `tools/fuzz.py KIND --count N --seed S`.

    python tools/fuzz.py checkpoints --count 500
    python tools/fuzz.py folders     --count 400
    python tools/fuzz.py tokenizers  --count 800

Every case ends well or with an error of the package's own, within 5 s and 1 GiB; each other one is a line of the
report, with its number: `--first NUMBER --count 1` runs it again. Exit code 1 when there is one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.fuzzing.harness import KINDS, fuzz


def main() -> int:
    """Run the cases; 1 when any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, help="what is damaged")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="cases (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the changes (default 0)")
    parser.add_argument(
        "--first", type=int, default=0, metavar="I", help="number of the first case (default 0)"
    )
    args = parser.parse_args()
    report = fuzz(args.kind, count=args.count, seed=args.seed, first=args.first)
    sys.stdout.write(report.text() + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
