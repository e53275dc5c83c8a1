"""Attention from the tokens of one branch to those of another: sampled at a few points, or dense.

Shape legend: n tiles, q query tokens, v value tokens (h' * w' cells), H heads, P points, d channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.models.piip.geometry import Grid, initial_offsets, reference_points


class Sampling(NamedTuple):
    """What deformable attention reads, and where.

    Attributes:
        value: [n, v, H, d].
        locations: (x, y) in [0, 1] on the value grid, [n, q, H, P, 2]; float32 or wider.
        weights: softmax over the points, [n, q, H, P].
    """

    value: Tensor
    locations: Tensor
    weights: Tensor


class DeformableAttention(torch.nn.Module):
    """Each query and head reads P bilinear samples of the value map around the query's own place.

        value = V f,   offsets = O q (pixels of the value grid),   weights = softmax_P(W q)
        location = centre of the query's cell + offset / (w', h')
        output = E concat_H sum_P weight * bilinear(value, location)         no q.k product, zeros outside

    (Deformable DETR with one level, as PIIP runs it; parameter names are those of the PIIP release.) Locations and
    the weighted sum are float32 in a bfloat16 model. The backward pass of `F.grid_sample` adds atomically on CUDA,
    so bit-equal repetition holds on CPU only (docs/piip.md).

    Args:
        width: channels of queries and of the output.
        value_width: channels of the value tokens.
        heads: H; must divide width * ratio.
        points: P.
        ratio: channels of all heads together, as a share of `width`.
        dtype: of the parameters.
    """

    def __init__(
        self, width: int, value_width: int, *, heads: int, points: int, ratio: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        inner = int(width * ratio)
        self.head_dim = inner // heads
        self.sampling_offsets = torch.nn.Linear(width, heads * points * 2, dtype=dtype)
        self.attention_weights = torch.nn.Linear(width, heads * points, dtype=dtype)
        self.value_proj = torch.nn.Linear(value_width, inner, dtype=dtype)
        self.output_proj = torch.nn.Linear(inner, width, dtype=dtype)

    def reset_parameters(self) -> None:
        """Offsets of a ring around the query, equal weights, Xavier-uniform values and output (release)."""
        for linear in (self.sampling_offsets, self.attention_weights):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(initial_offsets(self.heads, self.points).flatten())
        for linear in (self.value_proj, self.output_proj):
            torch.nn.init.xavier_uniform_(linear.weight)
            torch.nn.init.zeros_(linear.bias)

    def sampling(self, query: Tensor, value: Tensor, *, query_grid: Grid, value_grid: Grid) -> Sampling:
        """Queries [n, q, width] and values [n, v, value_width] to what is read where."""
        working = torch.float64 if query.dtype == torch.float64 else torch.float32
        split = (self.heads, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*split, 2)).to(working)
        weights = self.attention_weights(query).unflatten(-1, split).softmax(-1)
        height, width = value_grid
        points = reference_points(query_grid, dtype=working, device=query.device)
        locations = points[None, :, None, None, :] + offsets / offsets.new_tensor([width, height])
        heads = self.value_proj(value).unflatten(-1, (self.heads, self.head_dim))
        return Sampling(heads, locations, weights)

    def forward(self, query: Tensor, value: Tensor, *, query_grid: Grid, value_grid: Grid) -> Tensor:
        """Queries [n, q, width], values [n, v, value_width], both normalised, to [n, q, width]."""
        read = self.sampling(query, value, query_grid=query_grid, value_grid=value_grid)
        return self.output_proj(sample(read, value_grid).to(query.dtype))


def sample(read: Sampling, value_grid: Grid) -> Tensor:
    """Weighted bilinear samples [n, q, H * d], float32 or wider."""
    value, locations, weights = read
    n, _, heads, head_dim = value.shape
    working = locations.dtype
    maps = value.to(working).permute(0, 2, 3, 1).reshape(n * heads, head_dim, *value_grid)
    # Cell centres are whole numbers at location * size - 1/2: grid_sample's align_corners=False.
    where = (2.0 * locations - 1.0).transpose(1, 2).flatten(0, 1)  # [n*H, q, P, 2]
    samples = F.grid_sample(maps, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = weights.to(working).transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [n*H, 1, q, P]
    summed = (samples * weights).sum(-1)  # [n*H, d, q]
    return summed.view(n, heads * head_dim, -1).transpose(1, 2)


class CrossAttention(torch.nn.Module):
    """Multi-head attention of every query to every value token; queries, keys and values without bias.

    Args:
        width: channels of queries and of the output.
        value_width: channels of the value tokens.
        heads: must divide `width`.
        dtype: of the parameters.
    """

    def __init__(self, width: int, value_width: int, *, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.wq = torch.nn.Linear(width, width, bias=False, dtype=dtype)
        self.wk = torch.nn.Linear(value_width, width, bias=False, dtype=dtype)
        self.wv = torch.nn.Linear(value_width, width, bias=False, dtype=dtype)
        self.proj = torch.nn.Linear(width, width, dtype=dtype)

    def reset_parameters(self) -> None:
        """Truncated normal of 0.02, bias zero."""
        for linear in (self.wq, self.wk, self.wv, self.proj):
            torch.nn.init.trunc_normal_(linear.weight, std=0.02)
        torch.nn.init.zeros_(self.proj.bias)

    def forward(self, query: Tensor, value: Tensor, *, query_grid: Grid, value_grid: Grid) -> Tensor:
        """[n, q, width] and [n, v, value_width] to [n, q, width]; the grids are not used."""
        del query_grid, value_grid
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.wq, query), (self.wk, value), (self.wv, value))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))
