"""Print the tables of docs/numerics.md: largest errors of each layout over its cases, smallest of wrong variants.

python -m tests.numerics.measure [--all-cases] [GROUP ...]
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.numerics.layouts import GROUPS
from tests.numerics.test_mutations import CASE, VARIANTS
from tests.numerics.test_parity_matrix import EIGHT, TOLERANCES, all_cases, needed
from tests.support import parity

KNOWN = {**GROUPS, "8 ranks": (8, EIGHT)}


def rows(world_size, work, reference):
    """One line for each layout."""
    found = parity.compare_ranks(world_size, work, reference, timeout=3000)
    for row in work:
        worst = [
            max(found[row.name, str(case)][quantity][0] for case in row.cases) for quantity in TOLERANCES
        ]
        yield (
            f"| {row.name} | {world_size} | {len(row.cases)} | "
            + " | ".join("0" if error == 0 else f"{error:.1e}".replace("e-0", "e-") for error in worst)
            + " |\n"
        )


def variant_rows(folder):
    """One line for each wrong variant: the smallest of the errors that must be large."""
    reference = parity.reference_file(folder, [(CASE, parity.Options())])
    work = [parity.Work(name, layout, (CASE,), wrong) for name, (wrong, layout, _, _) in VARIANTS.items()]
    found = parity.compare_ranks(2, work, reference, timeout=3000)
    for name, (_, layout, wrong, _) in VARIANTS.items():
        errors = {quantity: found[name, str(CASE)][quantity][0] for quantity in wrong}
        least = min(wrong, key=errors.get)
        axis = next((axis for axis in ("tp", "cp") if getattr(layout.parallel, axis) > 1), "dp")
        sp = " sp" if layout.parallel.sequence_parallel else ""
        yield f"| {name} | {axis}2{sp} | {', '.join(wrong)} | {least} {errors[least]:.1e} |\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(KNOWN)}; default: all but 8 ranks"
    )
    parser.add_argument("--variants", action="store_true", help="the wrong variants instead of the layouts")
    parser.add_argument("--all-cases", action="store_true", help="all 18 cases for every layout")
    options = parser.parse_args()
    chosen = [KNOWN[name] for name in options.groups or GROUPS]
    if options.all_cases:
        chosen = [(world_size, all_cases(work)) for world_size, work in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        if options.variants:
            sys.stdout.writelines(variant_rows(Path(scratch)))
            return
        wanted = needed([work for _, work in chosen])
        reference = parity.reference_file(Path(scratch), wanted, timeout=3000)
        for world_size, work in chosen:
            sys.stdout.writelines(rows(world_size, work, reference))
            sys.stdout.flush()


if __name__ == "__main__":  # ranks import this module too
    main()
