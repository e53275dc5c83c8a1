"""Measure the tables of docs/numerics.md and write them there; the text around them stays.

python -m tests.numerics.measure                               every table but `golden` and `checkpoints`
python -m tests.numerics.measure golden checkpoints --golden DIR      the recorded numbers of DIR
python -m tests.numerics.measure layouts --group "8 ranks"     some rows; the others stay as they are
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.numerics.layouts import GROUPS
from tests.numerics.tables import figure, write
from tests.numerics.test_mutations import CASE, VARIANTS, reference_of_variants
from tests.numerics.test_parity_matrix import EIGHT, TOLERANCES, all_cases, needed
from tests.support import parity

KNOWN = {**GROUPS, "8 ranks": (8, EIGHT)}
TIMEOUT = 3000
GOLDEN = Path(__file__).parents[1] / "golden"
MODEL_COLUMNS = {
    "vision, projector": ("tile0_hidden_", "vit_last_hidden", "pixel_shuffled", "mlp1_out"),
    "logits": ("logits",),
    "loss per token": ("per_token_loss",),
    "mean loss": ("mean_loss",),
    "gradients": ("grad",),
}


@dataclass(frozen=True)
class Table:
    """Header of a table, what measures its rows, and first cells of all rows where part of them may be measured."""

    header: list
    rows: Callable
    order: list | None = None


def layout_rows(scratch, options):
    """Largest errors of each layout over its cases."""
    chosen = [KNOWN[name] for name in options.group or GROUPS]
    if options.all_cases:
        chosen = [(world_size, all_cases(work)) for world_size, work in chosen]
    reference = parity.reference_file(scratch, needed([work for _, work in chosen]), timeout=TIMEOUT)
    for world_size, work in chosen:
        found = parity.compare_ranks(world_size, work, reference, timeout=TIMEOUT)
        for row in work:
            errors = [found[row.name, str(case)] for case in row.cases]
            largest = [max(error[quantity][0] for error in errors) for quantity in TOLERANCES]
            yield [row.name, world_size, len(row.cases), *map(figure, largest)]


def variant_rows(scratch, options):
    """The smallest of the errors that must be large, for each wrong variant."""
    reference = reference_of_variants(scratch)
    work = [
        parity.Work(name, layout, (CASE,), mutation.variant) for name, (mutation, layout) in VARIANTS.items()
    ]
    found = parity.compare_ranks(2, work, reference, timeout=TIMEOUT)
    for name, (mutation, layout) in VARIANTS.items():
        wrong = mutation.wrong
        errors = {quantity: found[name, str(CASE)][quantity][0] for quantity in wrong}
        least = min(wrong, key=errors.get)
        axis = next((axis for axis in ("tp", "cp", "pp", "ep") if getattr(layout.parallel, axis) > 1), "dp")
        sp = " sp" if layout.parallel.sequence_parallel else ""
        yield [name, f"{axis}2{sp}", ", ".join(wrong), f"{least} {figure(errors[least])}"]


def attention_rows(scratch, options):
    """Native attention over two context parallel ranks against full attention in float64."""
    from tests.distributed.test_context_attention import BACK_ENDS, CASES, DTYPES, TOLERANCE, all_errors
    from tests.support.spawn import run_ranks

    by_rank = run_ranks(all_errors, 2, CASES, timeout=TIMEOUT)
    for dtype in DTYPES:
        for comm in BACK_ENDS:
            names = [name for name, case in CASES.items() if (case[0], case[4]) == (comm, dtype)]
            largest = max(max(errors[name]) for errors in by_rank for name in names)
            yield [f"{comm}, {str(dtype)[6:]}", len(names), figure(largest), figure(TOLERANCE[dtype])]


def reference_rows(scratch, options):
    """Five tiny families against the second implementation, on one rank and on two."""
    from megatron_v2pe.verification.numerics.compare import TOLERANCES as LIMITS
    from tests.distributed.test_numerics import LAYOUTS, compare_all, imported_families
    from tests.support.spawn import run_ranks

    folders = imported_families(scratch)
    runs = [(1, {"one rank": {}}, 0), (2, LAYOUTS, 1)]
    for world_size, layouts, stride in runs:
        found = run_ranks(compare_all, world_size, folders, layouts, stride, timeout=TIMEOUT)[0]
        for name in layouts:
            stages = [row for (layout, _), rows in found.items() if layout == name for row in rows]
            largest = max(row.relative for row in stages)
            positions = f"stride {stride}" if stride else "default"
            yield [name, positions, len(stages), figure(largest), figure(LIMITS["float32"])]


def bfloat16_rows(scratch, options):
    """Five steps in bfloat16 against float32."""
    from tests.e2e.test_bf16 import TOLERANCES as LIMITS
    from tests.e2e.test_bf16 import deviations, float32_run

    config, wanted = float32_run(scratch)
    found = {cp: deviations(config, wanted, scratch / f"cp{cp}", cp=cp) for cp in (1, 2)}
    for name, limit in LIMITS.items():
        yield [name, figure(found[1][name]), figure(found[2][name]), figure(limit)]


def golden_results(options):
    """Rows of `check-golden` of `options.golden`, as the verb itself computes them."""
    from megatron_v2pe.verification.golden.runner import run_groups, select_groups

    if not hasattr(options, "results"):
        with contextlib.redirect_stdout(io.StringIO()):
            groups = select_groups(options.golden, name=None, model_only=False)
            wanted = [group for group in groups if group.name in ("positions", "rope", "model")]
            options.results = list(run_groups(options.golden, wanted, family=None))
    return options.results


def golden_rows(scratch, options):
    """Positions and rotary tables: every quantity over its cases."""
    by_quantity = {}
    for row in golden_results(options):
        group = row.name.partition("/")[0]
        if group in ("positions", "rope"):
            by_quantity.setdefault((group, row.quantity), []).append(row)
    for (group, quantity), rows in by_quantity.items():
        largest, limit = max(row.error for row in rows), max(row.tolerance for row in rows)
        yield [f"{group}: {quantity}", len(rows), figure(largest), figure(limit)]


def checkpoint_rows(scratch, options):
    """The model group: largest deviations of each checkpoint, with the case where its tolerance is a wider one."""
    results = [row for row in golden_results(options) if row.name.startswith("model/")]
    keys = sorted({row.name.split("/")[1] for row in results} - {"vision_resize"})
    for key in keys:
        rows = [row for row in results if row.name.split("/")[1] == key]
        yield [
            checkpoint_name(options.golden, key),
            *(cell(rows, starts) for starts in MODEL_COLUMNS.values()),
        ]


def cell(rows, starts):
    """Largest deviation of quantities that start so; in brackets the case, if its tolerance is the wider one."""
    rows = [row for row in rows if row.quantity.startswith(starts)]
    worst = max(rows, key=lambda row: row.error)
    is_usual = worst.tolerance <= 10 * min(row.tolerance for row in rows)
    return figure(worst.error) + ("" if is_usual else f" ({worst.name.rpartition('/')[2]})")


def checkpoint_name(folder, key):
    """Language and vision model of a recorded checkpoint."""
    config = json.loads((folder / "ckpt" / key / "config.json").read_text(encoding="utf-8"))
    language = config["llm_config"]["architectures"][0].removesuffix("ForCausalLM")
    tower = "InternViT-6B" if config["vision_config"].get("qk_normalization") else "InternViT-300M"
    return f"{language}, {tower}"


DEVIATION = ["cases", "largest deviation", "tolerance"]
TABLES = {
    "golden": Table(["quantity", *DEVIATION], golden_rows),
    "checkpoints": Table(["checkpoint", *MODEL_COLUMNS], checkpoint_rows),
    "reference": Table(["layout", "positions", "stages", "largest relative error", "limit"], reference_rows),
    "layouts": Table(
        [
            "layout",
            "ranks",
            "cases",
            "loss",
            "gradient norm",
            "gradient",
            "weights, 1 update",
            "weights, 2 updates",
        ],
        layout_rows,
        order=[row.name for _, work in KNOWN.values() for row in work],
    ),
    "variants": Table(
        ["variant", "layout", "what must be wrong", "the least wrong of these"],
        variant_rows,
    ),
    "attention": Table(["back end", *DEVIATION], attention_rows),
    "bfloat16": Table(["quantity", "one rank", "cp 2, recomputed", "tolerance"], bfloat16_rows),
}
OWN = [name for name in TABLES if name not in ("golden", "checkpoints")]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: {', '.join(OWN)}"
    )
    parser.add_argument(
        "--group", action="append", choices=KNOWN, help="layouts: rows to measure; default: all but 8 ranks"
    )
    parser.add_argument("--all-cases", action="store_true", help="layouts: all 18 cases for each")
    parser.add_argument(
        "--golden", type=Path, default=GOLDEN, metavar="DIR", help="folder of recorded numbers"
    )
    options = parser.parse_args()
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    for name in options.tables or OWN:
        table = TABLES[name]
        with tempfile.TemporaryDirectory() as scratch:
            rows = list(table.rows(Path(scratch), options))
        write(name, table.header, rows, order=table.order)
        sys.stdout.writelines(f"{name}: {' | '.join(map(str, row))}\n" for row in rows)
        sys.stdout.flush()


if __name__ == "__main__":  # ranks import this module too
    main()
