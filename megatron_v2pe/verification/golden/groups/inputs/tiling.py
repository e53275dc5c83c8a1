"""Golden tiling: grids from sizes, and pixels of real images down to the normalised tile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from megatron_v2pe.batch.packed_batch import normalize_tiles
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.image import ImageFile, check_image
from megatron_v2pe.data.media.medium import MediaRules, MediumTiles, load_tile_range
from megatron_v2pe.data.media.normalization import NORMALIZATION, mean_color
from megatron_v2pe.data.media.tiling import TilingRule, choose_grid, tile_boxes
from megatron_v2pe.verification.golden.rows import Row, compared, equal

_MAX_PIXELS = 10**9
_SAME_PILLOW, _OTHER_PILLOW = 1e-6, 0.02  # another Pillow may round one grey level differently


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of tiling/ and preprocess/; tiling is the same for every family."""
    del family
    grids, pixels = folder / "tiling" / "grids.json", folder / "tiling" / "pixels.json"
    both = folder / "preprocess" / "tiles.json"
    if both.is_file():
        yield from _format_rows(json.loads(both.read_text(encoding="utf-8")))
    if grids.is_file():
        yield from _grid_rows(json.loads(grids.read_text(encoding="utf-8")))
    if pixels.is_file():
        yield from _pixel_rows(pixels)


def _grid_rows(table: dict[str, Any]) -> Iterator[Row]:
    for case in table["cases"]:
        facts = dict(zip(table["columns"], case, strict=True))
        setting = table["settings"][facts["setting_index"]]
        rule = TilingRule(
            image_size=setting["image_size"],
            min_tiles=setting["min_num"],
            max_tiles=setting["max_num"],
            use_thumbnail=setting["use_thumbnail"],
        )
        grid = choose_grid(facts["width"], facts["height"], rule=rule)
        ours = (grid.columns, grid.rows, grid.num_tiles)
        wanted = (facts["grid_cols"], facts["grid_rows"], facts["num_tiles_including_thumbnail"])
        name = f"tiling/{facts['width']}x{facts['height']}_setting{facts['setting_index']}"
        yield equal(name, "grid", is_equal=ours == wanted, detail=f"{ours}, expected {wanted}")


def _format_rows(table: dict[str, Any]) -> Iterator[Row]:
    """Grids of the GitHub code and of transformers' image processor, recorded side by side; ours must be both."""
    for case in table["cases"]:
        rule = TilingRule(image_size=case["size"], min_tiles=case["min"], max_tiles=case["max"])
        grid = choose_grid(case["width"], case["height"], rule=rule)
        ours = [grid.columns, grid.rows]
        name = f"tiling/{case['width']}x{case['height']}_{case['min']}to{case['max']}"
        for quantity in ("github", "hf"):
            detail = f"{ours}, expected {case[quantity]}"
            yield equal(name, f"grid of {quantity}", is_equal=ours == case[quantity], detail=detail)
    for case in table["pixels"]:
        grid = choose_grid(case["width"], case["height"], rule=TilingRule(image_size=case["size"]))
        wanted = [case["github_tiles"], *case["hf_num_patches"]]
        is_equal = set(wanted) == {grid.num_tiles}
        yield equal(
            f"tiling/{case['width']}x{case['height']}_of_{case['size']}",
            "num_tiles",
            is_equal=is_equal,
            detail=f"{grid.num_tiles}, expected {wanted}",
        )


def _pixel_rows(path: Path) -> Iterator[Row]:
    table = json.loads(path.read_text(encoding="utf-8"))
    is_same_pillow = table.get("pillow") == PIL.__version__
    tolerance = _SAME_PILLOW if is_same_pillow else _OTHER_PILLOW
    with safe_open(path.with_suffix(".safetensors"), framework="np") as tensors:
        for case in table["cases"]:
            name = f"tiling/pixels_{case['index']}"
            file = _medium(path.parent / case["image"], case)
            (image,) = file.images
            ours = normalized_tiles(file, image_size=case["image_size"], normalize_type=case["normalize"])
            boxes = tile_boxes(image.grid, case["image_size"]) if case["dynamic"] else [(0, 0, *image.size)]
            wanted_boxes = [tuple(box) for box in case["boxes"]]
            yield equal(
                name, "boxes", is_equal=boxes == wanted_boxes, detail=f"{boxes}, expected {wanted_boxes}"
            )
            yield _shape_row(name, ours, case)
            if list(ours.shape) != case["shape"]:
                continue
            stored, rows = _stored(case, tensors, ours)
            yield compared(name, "pixels", error=float(np.abs(rows - stored).max()), tolerance=tolerance)
            yield _mean_row(name, ours, case, tolerance)
            if is_same_pillow:
                digest = hashlib.sha256(ours.tobytes()).hexdigest()
                yield equal(
                    name, "sha256", is_equal=digest == case["sha256_float32"], detail="some pixel differs"
                )


def _medium(path: Path, case: dict[str, Any]) -> MediumTiles:
    rule = TilingRule(
        image_size=case["image_size"],
        dynamic=case["dynamic"],
        min_tiles=case["min_num"],
        max_tiles=case["max_num"],
        use_thumbnail=case["use_thumbnail"],
    )
    size = check_image(str(path), max_pixels=_MAX_PIXELS)
    is_padded = case["pad2square"] and not case["dynamic"]
    image = ImageTiles(
        size=size,
        grid=choose_grid(*size, rule=rule),
        pad_color=mean_color(case["normalize"]) if is_padded else None,
    )
    return MediumTiles(
        medium=ImageFile(path=str(path)), images=(image,), rules=MediaRules(max_pixels=_MAX_PIXELS)
    )


def normalized_tiles(file: MediumTiles, *, image_size: int, normalize_type: Any) -> NDArray[np.float32]:
    """All tiles of an image as the model gets them, float32 [n, 3, S, S]."""
    tiles = load_tile_range([file], image_size=image_size, tile_range=(0, file.num_tiles))
    return normalize_tiles(torch.from_numpy(tiles), NORMALIZATION[normalize_type]).numpy()


def _shape_row(name: str, ours: NDArray[np.float32], case: dict[str, Any]) -> Row:
    shape = list(ours.shape)
    return equal(name, "shape", is_equal=shape == case["shape"], detail=f"{shape}, expected {case['shape']}")


def _stored(
    case: dict[str, Any], tensors: Any, ours: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Stored pixels and ours at the same places."""
    name = f"pixels_{case['index']}"
    if "stored_tiles" in case:
        return tensors.get_tensor(name), ours[case["stored_tiles"]]
    return tensors.get_tensor(f"{name}_every32"), ours[:, :, 3::32, 5::32]


def _mean_row(name: str, ours: NDArray[np.float32], case: dict[str, Any], tolerance: float) -> Row:
    """Mean and deviation per tile and channel cover the pixels that are not stored."""
    means = ours.astype(np.float64).mean(axis=(2, 3)) - np.array(case["mean_per_tile_channel"])
    deviations = ours.astype(np.float64).std(axis=(2, 3), ddof=1) - np.array(case["std_per_tile_channel"])
    error = float(max(np.abs(means).max(), np.abs(deviations).max()))
    return compared(name, "mean_and_std", error=error, tolerance=max(tolerance, 2e-5))
