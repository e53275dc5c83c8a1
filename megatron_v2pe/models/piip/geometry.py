"""Grids of a pyramid: resized pixels, position tables, patch kernels, reference points of deformable attention.

Shape legend: n tiles, C channels, h, w grid cells, N = h*w, p pixels of a patch's side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Height and width in cells."""


def resize_pixels(pixels: Tensor, size: Grid) -> Tensor:
    """Normalised pixels [n, 3, H, W] to [n, 3, *size], bilinear without antialiasing.

    The size is given, never a scale factor: `F.interpolate(scale_factor=a/b)` may be one pixel short (238 of 322).
    """
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


def resize_positions(table: Tensor, grid: Grid) -> Tensor:
    """Positions [1, N0, C] of a square grid to [1, h*w, C]: bicubic, in float32 or wider."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"a position table of {table.shape[1]} rows is no square grid")
    if (side, side) == grid:
        return table
    image = _wide(table).reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, C, side, side]
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def resize_patch_kernel(weight: Tensor, patch: int) -> Tensor:
    """Patch kernel [C, 3, p0, p0] to [C, 3, patch, patch]: bicubic, in float32 or wider."""
    if weight.shape[-1] == patch:
        return weight
    resized = F.interpolate(_wide(weight), size=(patch, patch), mode="bicubic", align_corners=False)
    return resized.to(weight.dtype)


def reference_points(grid: Grid, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Centres (x, y) in [0, 1] of the cells of a query grid, row by row: [h*w, 2]."""
    height, width = grid
    y = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
    y_grid, x_grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x_grid.reshape(-1), y_grid.reshape(-1)], dim=-1)


def initial_offsets(heads: int, points: int) -> Tensor:
    """Offset bias [heads, points, 2] at start: head k looks along angle 2*pi*k/heads, point j is j+1 cells away."""
    angles = torch.arange(heads, dtype=torch.float32) * (2.0 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().max(-1, keepdim=True).values
    steps = torch.arange(1, points + 1, dtype=torch.float32)
    return directions[:, None, :] * steps[None, :, None]


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """[n, h*w, C] to [n, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def map_to_tokens(image: Tensor) -> Tensor:
    """[n, C, h, w] to [n, h*w, C]."""
    return image.flatten(2).transpose(1, 2)


def resize_map(image: Tensor, grid: Grid) -> Tensor:
    """[n, C, h, w] to [n, C, *grid], bilinear."""
    return F.interpolate(image, size=grid, mode="bilinear", align_corners=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
