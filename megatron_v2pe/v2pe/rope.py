"""Rotary angles of fractional positions, exact at any length.

    angle[t, j] = position[t] * base^(-2j/d),  j = 0..d/2-1         (NeoX halves: dimension j pairs with j + d/2)

`exact`: the product is formed in float64 from integer position units, reduced modulo 2*pi, then cast to
float32, so cos and sin are right to 3e-7 at any position. `reference`: float32 position times float32
frequency, as the release computes it (release: V2PE rotary class of InternLM2), off by up to 0.06 rad at 1M.

Shape legend: t local tokens, d rotary dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopePrecision = Literal["exact", "reference"]
ScalingType = Literal["none", "linear", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """What a checkpoint says about its rotary embedding.

    Attributes:
        dim: rotary dimension d of a head.
        base: theta.
        scaling: `none` (V2PE and plain), `linear`, or `dynamic` (NTK).
        factor: scaling factor of `linear` and `dynamic`.
        max_positions: trained positions (`max_position_embeddings`); `dynamic` acts beyond them.
        tokens_per_tile: the T of a position unit 1/T.
        precision: `exact` or `reference`.
        fractional: the module may be given positions between integers (V2PE). A module that may not
            refuses them instead of flooring them, which the release does silently (its defect D6).
    """

    dim: int
    base: float
    scaling: ScalingType = "none"
    factor: float = 1.0
    max_positions: int = 0
    tokens_per_tile: int = 256
    precision: RopePrecision = "exact"
    fractional: bool = False


def ntk_base(spec: RopeSpec, rope_length: int) -> float:
    """Base of dynamic NTK for a sequence of `rope_length` positions.

    base' = base * ((f*L/M) - (f-1))^(d/(d-2)) once L exceeds M (release: dynamic NTK rotary class).
    """
    if rope_length <= spec.max_positions:
        return spec.base
    growth = spec.factor * rope_length / spec.max_positions - (spec.factor - 1.0)
    return spec.base * growth ** (spec.dim / (spec.dim - 2))


def inverse_frequencies(spec: RopeSpec, rope_length: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Frequencies base^(-2j/d) as [d/2], for a pack whose positions end at `rope_length`.

    float32 follows the release's order of operations; its table differs from the rounded float64 one.
    """
    base = ntk_base(spec, rope_length) if spec.scaling == "dynamic" else spec.base
    exponents = torch.arange(0, spec.dim, 2, dtype=dtype) / spec.dim
    return 1.0 / (base**exponents)


def rope_angles(position_units: Tensor, spec: RopeSpec, *, rope_length: int) -> Tensor:
    """Angles of each token, float32 [t, d/2].

    Args:
        position_units: int64 [t], positions in units of 1/tokens_per_tile.
        spec: rotary embedding of the checkpoint.
        rope_length: largest position of the whole pack plus one (dynamic NTK); the same on every shard.

    Raises:
        ValueError: fractional positions for a module that cannot take them, or a wrong dtype.
    """
    if position_units.dtype != torch.int64:
        raise ValueError(
            f"positions are int64 counts of 1/{spec.tokens_per_tile}, got {position_units.dtype}"
        )
    if not spec.fractional and bool((position_units % spec.tokens_per_tile).any()):
        raise ValueError(
            "fractional positions reached a rotary module without V2PE; set position.mode to v2pe_fixed or "
            "v2pe_random, or use the default stride"
        )
    scale = 1.0 / spec.factor if spec.scaling == "linear" else 1.0
    if spec.precision == "reference":
        positions = (position_units.double() / spec.tokens_per_tile).float()
        if spec.scaling == "linear":
            positions = positions / spec.factor
        frequencies = inverse_frequencies(spec, rope_length, dtype=torch.float32).to(positions.device)
        return torch.outer(positions, frequencies)
    frequencies = inverse_frequencies(spec, rope_length).to(position_units.device) * (
        scale / spec.tokens_per_tile
    )
    angles = torch.outer(position_units.double(), frequencies)
    return torch.remainder(angles, 2.0 * math.pi).float()


def apply_rotary(x_thd: Tensor, angles: Tensor, *, round_tables: bool = False) -> Tensor:
    """Rotate heads by their token's angles: x*cos + rotate_half(x)*sin, NeoX halves.

    Args:
        x_thd: [t, h, d], queries or keys in the compute dtype.
        angles: float32 [t, d/2] from `rope_angles`.
        round_tables: round cos and sin to the dtype of `x_thd` first, as the release does in bf16
            (`rope_precision: reference`; the release's defect D9).

    Returns:
        [t, h, d] in the dtype of `x_thd`; computed in float32 (float64 for float64 input).
    """
    working = torch.float64 if x_thd.dtype == torch.float64 else torch.float32
    tables = (angles.cos(), angles.sin())
    if round_tables:
        tables = (tables[0].to(x_thd.dtype), tables[1].to(x_thd.dtype))
    cos, sin = (table.to(working).unsqueeze(1) for table in tables)  # [t, 1, d/2]
    first, second = x_thd.to(working).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_thd.dtype)
