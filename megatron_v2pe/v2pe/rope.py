"""Rotary angles of fractional positions, exact at any length.

    angle[t, j] = position[t] * base^(-2j/d),  j = 0..d/2-1         (NeoX halves: dimension j pairs with j + d/2)

`exact`: the product is formed in float64 from integer position units, reduced modulo 2*pi, then cast to
float32, so cos and sin are right to 3e-7 at any position. `reference`: float32 position times float32
frequency, as the release computes it (release: V2PE rotary class of InternLM2), off by up to 0.06 rad at 1M.

Shape legend: t local tokens, d rotary dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_v2pe.config.arch.rope_scaling import RopeScaling

RopePrecision = Literal["exact", "reference"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """What a checkpoint says about its rotary embedding.

    Attributes:
        dim: rotary dimension d of a head.
        base: theta.
        scaling: how the frequencies are stretched.
        tokens_per_tile: the T of a position unit 1/T.
        precision: `exact` or `reference`.
        fractional: the module may be given positions between integers (V2PE). A module that may not
            refuses them instead of flooring them, which the release does silently.
    """

    dim: int
    base: float
    scaling: RopeScaling = field(default_factory=RopeScaling)
    tokens_per_tile: int = 256
    precision: RopePrecision = "exact"
    fractional: bool = False


def ntk_base(spec: RopeSpec, rope_length: int) -> float:
    """Base of dynamic NTK for a sequence of `rope_length` positions.

    base' = base * ((f*L/M) - (f-1))^(d/(d-2)) once L exceeds M (release: dynamic NTK rotary class).
    """
    factor, trained = spec.scaling.factor, spec.scaling.trained_positions
    if rope_length <= trained:
        return spec.base
    growth = factor * rope_length / trained - (factor - 1.0)
    return spec.base * growth ** (spec.dim / (spec.dim - 2))


def inverse_frequencies(spec: RopeSpec, rope_length: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Frequencies base^(-2j/d), stretched, as [d/2], for a pack whose positions end at `rope_length`.

    float32 follows the order of operations of the release and of transformers (whose Phi-3, Llama 3.1 and YaRN
    these are); its table differs from the rounded float64 one. Linear scaling acts on positions there, not here.
    """
    scaling = spec.scaling
    base = ntk_base(spec, rope_length) if scaling.kind == "dynamic" else spec.base
    exponents = torch.arange(0, spec.dim, 2, dtype=dtype) / spec.dim
    if scaling.kind == "longrope":
        is_long = rope_length > scaling.trained_positions
        factors = scaling.long_factors if is_long else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=dtype) * base**exponents)
    frequencies = 1.0 / (base**exponents)
    if scaling.kind == "yarn":
        return _yarn_ramp(frequencies, spec)
    return _llama3_ramp(frequencies, scaling) if scaling.kind == "llama3" else frequencies


def _llama3_ramp(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep what turns often within the trained length M, divide what turns rarely, blend between them.

    turns = M * frequency / 2 pi;  kept = (turns - low) / (high - low), at least 0 and at most 1
    """
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.trained_positions * frequencies / (2.0 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def _yarn_ramp(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Keep the first indices j, divide the last, blend between two of them (YaRN, arXiv 2309.00071, section 3.2).

    A frequency of index j turns M * frequency / 2 pi times within the trained length M, so the index of t turns is
    j(t) = d ln(M / (2 pi t)) / (2 ln base);   divided = (j - j(fast)) / (j(slow) - j(fast)), at least 0 and at most 1
    """
    scaling = spec.scaling
    first, last = (
        spec.dim * math.log(scaling.trained_positions / (2.0 * math.pi * turns)) / (2.0 * math.log(spec.base))
        for turns in (scaling.fast_turns, scaling.slow_turns)
    )
    if scaling.truncates:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, spec.dim - 1.0)
    last += 0.001 if first == last else 0.0  # as transformers: no division by zero
    index = torch.arange(spec.dim // 2, dtype=frequencies.dtype)
    divided = ((index - first) / (last - first)).clamp(0.0, 1.0)
    return divided * frequencies / scaling.factor + (1.0 - divided) * frequencies


def rope_angles(
    position_units: Tensor, spec: RopeSpec, *, rope_length: int, has_fractions: bool | None = None
) -> Tensor:
    """Angles of each token, float32 [t, d/2].

    Args:
        position_units: int64 [t], positions in units of 1/tokens_per_tile.
        spec: rotary embedding of the checkpoint.
        rope_length: largest position of the whole pack plus one, by which dynamic NTK and longrope choose; the
            same on every shard.
        has_fractions: some position is not whole, where the caller knows; None looks, for which a GPU's host waits.

    Raises:
        ValueError: fractional positions for a module without V2PE, or a wrong dtype.
    """
    if position_units.dtype != torch.int64:
        raise ValueError(
            f"positions are int64 counts of 1/{spec.tokens_per_tile}, got {position_units.dtype}"
        )
    if not spec.fractional and has_fractions is None:
        has_fractions = bool((position_units % spec.tokens_per_tile).any())
    if has_fractions and not spec.fractional:
        raise ValueError(
            "fractional positions reached a rotary module without V2PE; set position.mode to v2pe_fixed or "
            "v2pe_random, or use the default stride"
        )
    linear = spec.scaling.factor if spec.scaling.kind == "linear" else 1.0
    if spec.precision == "reference":
        positions = (position_units.double() / spec.tokens_per_tile).float()
        frequencies = _frequencies_on(positions.device, spec, rope_length, torch.float32)
        return torch.outer(positions / linear, frequencies)
    frequencies = _frequencies_on(position_units.device, spec, rope_length, torch.float64)
    frequencies = frequencies / (linear * spec.tokens_per_tile)
    angles = torch.outer(position_units.double(), frequencies)
    return torch.remainder(angles, 2.0 * math.pi).float()


def _frequencies_on(device: torch.device, spec: RopeSpec, rope_length: int, dtype: torch.dtype) -> Tensor:
    """`inverse_frequencies` on a device; a GPU's are kept, because the host waits for a copy of them."""
    if device.type != "cuda":
        return inverse_frequencies(spec, rope_length, dtype=dtype).to(device)
    is_by_length = spec.scaling.kind in ("dynamic", "longrope")
    return _kept_frequencies(device, spec, rope_length if is_by_length else 0, dtype)


@lru_cache(maxsize=64)
def _kept_frequencies(device: torch.device, spec: RopeSpec, rope_length: int, dtype: torch.dtype) -> Tensor:
    return inverse_frequencies(spec, rope_length, dtype=dtype).to(device)


def rotary_tables(
    angles: Tensor, dtype: torch.dtype, *, scale: float = 1.0, round_tables: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [t, 1, d] of angles [t, d/2], for heads in `dtype`; see `apply_rotary`.

    Both halves of the cosines are alike; the first half of the sines has the other sign, as `rotated` needs it.
    """
    working = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    if round_tables:
        cos, sin = cos.to(dtype), sin.to(dtype)
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return cos.to(working).unsqueeze(1), sin.to(working).unsqueeze(1)


def rotated(x_thd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [t, h, d] by tables [t, 1, d] of `rotary_tables`; minus the sines rotate back.

    x * cos + (halves of x exchanged) * sin, in the memory of the exchanged halves.
    """
    x = x_thd.to(cos.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1).mul_(sin).addcmul_(x, cos).to(x_thd.dtype)


def apply_rotary(x_thd: Tensor, angles: Tensor, *, scale: float = 1.0, round_tables: bool = False) -> Tensor:
    """Rotate heads by their token's angles: x*cos + rotate_half(x)*sin, NeoX halves.

    Args:
        x_thd: [t, h, d], queries or keys in the compute dtype.
        angles: float32 [t, d/2] from `rope_angles`.
        scale: attention factor, multiplies cos and sin (longrope, yarn).
        round_tables: round cos and sin to the dtype of `x_thd` first, as the release does in bf16
            (`rope_precision: reference`).

    Returns:
        [t, h, d] in the dtype of `x_thd`; computed in float32 (float64 for float64 input).
    """
    return rotated(x_thd, *rotary_tables(angles, x_thd.dtype, scale=scale, round_tables=round_tables))
