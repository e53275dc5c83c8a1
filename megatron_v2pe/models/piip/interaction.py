"""Exchange of features between neighbouring branches of a pyramid.

    unit(x, y):  p = A y, q = B x  (both from the old x, y)      x of the larger network
                 x <- injector(x, p)      y <- injector(y, q)
    injector(x, p):  x <- x + g_a * attention(norm(x), norm(p))              g_a, g_f zero at start
                     x <- x + g_f * drop_path(ffn(norm(x)))

Parameter names are those of the PIIP release. Shape legend: n tiles, N tokens of a branch (h*w), C its channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.models.piip.attention import CrossAttention, DeformableAttention
from megatron_v2pe.models.piip.geometry import Grid, map_to_tokens, tokens_to_map

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class InteractionSettings:
    """What all interactions of a tower have in common.

    Attributes:
        heads: heads of the attention between branches.
        points: points that a head of deformable attention reads.
        value_ratio: channels of all heads together, as a share of the query's width.
        ffn_ratio: hidden channels of the injector's feed-forward, as a share of the width.
        attention: deformable, or dense (every token to every token).
        norm: LayerNorm before attention and feed-forward.
        projection: bring the other branch to this branch's width before the injector.
        drop_path: rate of the injector's feed-forward, per tile.
    """

    heads: int = 16
    points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25
    attention: Literal["deformable", "dense"] = "deformable"
    norm: bool = True
    projection: bool = True
    drop_path: float = 0.4


class DepthwiseConv(torch.nn.Module):
    """3x3 convolution of each channel on the branch's grid."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dwconv = torch.nn.Conv2d(width, width, 3, padding=1, groups=width, dtype=dtype)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[n, N, C] to the same shape."""
        return map_to_tokens(self.dwconv(tokens_to_map(x, grid)))


class ConvFeedForward(torch.nn.Module):
    """linear, depthwise 3x3 convolution, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(width, hidden, dtype=dtype)
        self.dwconv = DepthwiseConv(hidden, dtype)
        self.fc2 = torch.nn.Linear(hidden, width, dtype=dtype)

    def reset_parameters(self) -> None:
        """Linears: truncated normal of 0.02; convolution: normal of sqrt(2/9); biases zero (release)."""
        for linear in (self.fc1, self.fc2):
            torch.nn.init.trunc_normal_(linear.weight, std=0.02)
            torch.nn.init.zeros_(linear.bias)
        torch.nn.init.normal_(self.dwconv.dwconv.weight, std=math.sqrt(2.0 / 9.0))
        assert self.dwconv.dwconv.bias is not None
        torch.nn.init.zeros_(self.dwconv.dwconv.bias)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[n, N, C] to the same shape."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))


def _drop_tiles(x: Tensor, rate: float) -> Tensor:
    """Zero whole tiles of [n, N, C] with probability `rate`, scaling the others by 1/(1-rate)."""
    keep = 1.0 - rate
    return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Injector(torch.nn.Module):
    """Adds features of another branch to this one, through two gates.

    Args:
        width: channels of this branch.
        value_width: channels of what comes from the other branch.
        settings: shared by the tower.
        dtype: of the parameters.
    """

    def __init__(
        self, width: int, value_width: int, settings: InteractionSettings, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.drop_path = settings.drop_path
        self.attn: DeformableAttention | CrossAttention
        if settings.attention == "deformable":
            self.attn = DeformableAttention(
                width,
                value_width,
                heads=settings.heads,
                points=settings.points,
                ratio=settings.value_ratio,
                dtype=dtype,
            )
        else:
            self.attn = CrossAttention(width, value_width, heads=settings.heads, dtype=dtype)
        self.query_norm = _norm(width, settings, dtype)
        self.feat_norm = _norm(value_width, settings, dtype)
        self.ffn_norm = _norm(width, settings, dtype)
        self.ffn = ConvFeedForward(width, int(width * settings.ffn_ratio), dtype)
        self.ca_gamma = torch.nn.Parameter(torch.zeros(width, dtype=dtype))
        self.cffn_gamma = torch.nn.Parameter(torch.zeros(width, dtype=dtype))

    def reset_parameters(self) -> None:
        """The release's start: gates zero, so that the branch is unchanged."""
        self.attn.reset_parameters()
        self.ffn.reset_parameters()
        for gate in (self.ca_gamma, self.cffn_gamma):
            torch.nn.init.zeros_(gate)

    def forward(self, x: Tensor, feat: Tensor, *, grid: Grid, feat_grid: Grid) -> Tensor:
        """This branch [n, N, C] and the other's features [n, N', C'] to [n, N, C]."""
        read = self.attn(self.query_norm(x), self.feat_norm(feat), query_grid=grid, value_grid=feat_grid)
        x = x + self.ca_gamma * read
        added = self.ffn(self.ffn_norm(x), grid)
        if self.training and self.drop_path > 0:
            added = _drop_tiles(added, self.drop_path)
        return x + self.cffn_gamma * added


class InteractionUnit(torch.nn.Module):
    """Both directions between two neighbours, from their old features.

    Args:
        widths: channels of the larger network ("branch1") and of the smaller one ("branch2").
        settings: shared by the tower.
        into_smaller: build the way from the larger to the smaller network; false at a tower's last interaction
            when nothing reads the smaller branch afterwards (an unused half would never get gradients, and DDP's
            overlapped reduction would wait for it).
        dtype: of the parameters.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        settings: InteractionSettings,
        *,
        into_smaller: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        large, small = widths
        self.into_smaller = into_smaller
        self.has_projection = settings.projection
        if settings.projection:
            self.branch2to1_proj = torch.nn.Linear(small, large, dtype=dtype)
        self.branch2to1_injector = Injector(large, large if settings.projection else small, settings, dtype)
        if into_smaller:
            if settings.projection:
                self.branch1to2_proj = torch.nn.Linear(large, small, dtype=dtype)
            self.branch1to2_injector = Injector(
                small, small if settings.projection else large, settings, dtype
            )

    def reset_parameters(self) -> None:
        """The release's start."""
        for name, module in self.named_children():
            if name.endswith("_proj"):
                torch.nn.init.trunc_normal_(module.weight, std=0.02)  # type: ignore[arg-type]
                torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            else:
                module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, y: Tensor, *, grids: tuple[Grid, Grid]) -> tuple[Tensor, Tensor]:
        """Larger network's tokens [n, N, C] and smaller one's [n, N', C'] to their successors."""
        large_grid, small_grid = grids
        into_large = self.branch2to1_proj(y) if self.has_projection else y
        new_x = self.branch2to1_injector(x, into_large, grid=large_grid, feat_grid=small_grid)
        if not self.into_smaller:
            return new_x, y
        into_small = self.branch1to2_proj(x) if self.has_projection else x
        new_y = self.branch1to2_injector(y, into_small, grid=small_grid, feat_grid=large_grid)
        return new_x, new_y


class Interaction(torch.nn.Module):
    """All neighbouring pairs of a pyramid once, the finest pair first.

    Args:
        widths: channels of each branch, largest network first.
        settings: shared by the tower.
        into_smaller: see `InteractionUnit`.
        dtype: of the parameters.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        settings: InteractionSettings,
        *,
        into_smaller: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_branches = len(widths)
        for index in range(len(widths) - 1):
            unit = InteractionUnit(
                (widths[index], widths[index + 1]), settings, into_smaller=into_smaller, dtype=dtype
            )
            self.add_module(unit_name(index), unit)

    def reset_parameters(self) -> None:
        """The release's start."""
        for unit in self.children():
            unit.reset_parameters()  # type: ignore[operator]

    def forward(self, tokens: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        """Tokens [n, N_b, C_b] of every branch to their successors."""
        tokens = list(tokens)
        for index in reversed(range(self.num_branches - 1)):
            unit = self.get_submodule(unit_name(index))
            pair = (grids[index], grids[index + 1])
            tokens[index], tokens[index + 1] = unit(tokens[index], tokens[index + 1], grids=pair)
        return tokens


def unit_name(index: int) -> str:
    """The release's name of the pair (index, index + 1), counted from 0."""
    return f"interaction_units_{index + 1}{index + 2}"


def _norm(width: int, settings: InteractionSettings, dtype: torch.dtype) -> torch.nn.Module:
    return torch.nn.LayerNorm(width, eps=NORM_EPS, dtype=dtype) if settings.norm else torch.nn.Identity()
