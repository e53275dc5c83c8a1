"""PIIP: deformable attention, interactions, whole towers, against numbers of the release's own modules.

A folder holds them directly or below `piip/`: modules, classification, detection, towers, llava (forward, gradients),
resize, geometry (tables). Outputs, values on the way, loss, gradients and their norms, and which parameters take no
part are compared in float32; the loss again in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.models.piip.geometry import (
    initial_offsets,
    reference_points,
    resize_patch_kernel,
    resize_pixels,
    resize_positions,
)
from megatron_v2pe.verification.golden.pyramid.cases import PyramidCase, RunCase, case_rows, open_cases
from megatron_v2pe.verification.golden.pyramid.models import run_image_model, run_module, run_projector
from megatron_v2pe.verification.golden.pyramid.towers import run_tower
from megatron_v2pe.verification.golden.rows import Row, compared, equal

TABLE_ATOL = 1e-6  # float32 reference points and offsets of up to 4 cells
FILES = ("modules", "classification", "detection", "towers", "llava")


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """All cases; `family` names checkpoints, of which there are none here."""
    del family
    for place in (folder, folder / "piip"):
        for name in FILES:
            path = place / f"{name}.json"
            if path.exists():
                for case in open_cases(path):
                    yield from case_rows(case, _runner(case))
        if (place / "resize.json").exists():
            for case in open_cases(place / "resize.json"):
                yield from _resize_rows(case)
        if (place / "geometry.json").exists():
            yield from _geometry_rows(json.loads((place / "geometry.json").read_text(encoding="utf-8")))


def _runner(case: PyramidCase) -> RunCase:
    if case.file == "modules":
        return run_module
    if case.file == "towers":
        return run_tower
    return run_projector if "x1" in case.config else run_image_model


def _resize_rows(case: PyramidCase) -> Iterator[Row]:
    """Tables of a checkpoint for another patch size."""
    given, args = case.part("input", torch.float32), case.config["args"]
    side = args["pretrain_img_size"] // args["patch_size"]
    table = given["pos_embed"]
    has_class_row = case.config["kind"] == "intern"
    rows = resize_positions(table[:, 1:] if has_class_row else table, (side, side))
    outputs = {
        "pos_embed": torch.cat([table[:, :1], rows], dim=1) if has_class_row else rows,
        "patch_embed.proj.weight": resize_patch_kernel(given["patch_embed.proj.weight"], args["patch_size"]),
    }
    for name, wanted in case.part("output").items():
        yield _row(f"piip/resize/{case.name}", name, outputs[name], wanted, case.tolerance("outputs"))


def _geometry_rows(values: dict[str, Any]) -> Iterator[Row]:
    """Sizes, grids, reference points and the first offsets."""
    for size, largest, released in values.get("resize", []):
        ours = resize_pixels(torch.zeros(1, 1, 1, largest), (1, size)).shape[-1]
        short = int(largest * (size / largest))
        is_known = ours == size and released == short
        detail = f"ours {ours}, released {released}, floor of the product {short}"
        yield equal(f"piip/geometry/resize_{size}_of_{largest}", "size", is_equal=is_known, detail=detail)
    for pair in values.get("deform_inputs", []):
        grids = [pair[f"size{branch}"] // pair[f"patch{branch}"] for branch in (1, 2)]
        for into, (own, other) in {"into1": grids, "into2": grids[::-1]}.items():
            wanted = pair[into]
            is_same = wanted == {"queries": own * own, "value_grid": [other, other]}
            name = f"piip/geometry/{pair['size1']}_{pair['size2']}_patch{pair['patch2']}"
            yield equal(name, into, is_equal=is_same, detail=f"ours {own} x {own} reads {other} x {other}")
    for row in values.get("reference_points", []):
        height, width = row["grid"]
        own = reference_points((height, width), dtype=torch.float32)
        name = f"piip/geometry/points_{height}x{width}"
        yield _row(name, "reference_points", own, torch.tensor(row["points_xy"]), TABLE_ATOL)
    for row in values.get("initial_offsets", []):
        name = f"piip/geometry/offsets_{row['n_heads']}x{row['n_points']}"
        own = initial_offsets(row["n_heads"], row["n_points"]).flatten()
        yield _row(name, "initial_offsets", own, torch.tensor(row["bias"]), TABLE_ATOL)


def _row(name: str, quantity: str, value: Tensor, wanted: Tensor, tolerance: float) -> Row:
    error = float((value - wanted).abs().max()) if value.shape == wanted.shape else float("nan")
    return compared(name, quantity, error=error, tolerance=tolerance)
