"""Data: planning, indexing and loading, each beside a target or an alternative of the same run.

python tools/bench_data.py index              records per second of processor time, and what a kill costs
python tools/bench_data.py loader             the training loader against bare Pillow, 1 and 2 workers, shares at cp 4
python tools/bench_data.py plan               1.5 million samples with the release's repeats; time, fill and imbalance

All three make their own data and together need under three minutes on two idle cores. Each target is a line that begins
with `pass` or `FAIL`. Processor time represents speed where it can, as it depends little on who else is busy; wall time
(2 workers against 1) means something on idle cores only, so the load is printed first.
"""

from __future__ import annotations

import argparse

from bench_support import data_index, data_loader, data_plan

VERBS = {"plan": data_plan, "index": data_index, "loader": data_loader}


def main() -> None:
    """Parse the command line and run one of the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
