"""Rotary frequencies of the reference model: the scaling rules of the released models, written a second time.

none      theta^(-2j/d)
linear    / factor
dynamic   theta' = theta * (factor * L / M - factor + 1)^(d / (d - 2)) beyond the trained length M
longrope  / short_factor[j] up to M, / long_factor[j] beyond it (Phi-3, "su")
llama3    / factor where a wave is longer than M / low_freq_factor, kept where it is shorter than M / high_freq_factor
yarn      / factor from index j(1) on, kept up to j(32), j(t) the index that turns t times within M

Where a run has V2PE positions linear and dynamic scaling are off, as in the release.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.rope_scaling import RopeScaling


def frequencies(arch: InternVLArchitecture, positions: Tensor, *, is_v2pe: bool) -> Tensor:
    """Turns per position, float64 [d/2].

    Args:
        arch: its config.json says rope_theta and rope_scaling.
        positions: float64 [t], of a whole pack; the largest chooses for dynamic and longrope.
        is_v2pe: positions may be fractions.
    """
    language, scaling = arch.language, arch.language.rope_scaling
    if is_v2pe and scaling.kind in ("linear", "dynamic"):
        scaling = RopeScaling()
    d, theta = language.head_dim, language.rope_theta
    length, trained = float(positions.max()) + 1.0, scaling.trained_positions
    if scaling.kind == "dynamic" and length > trained:
        theta *= (scaling.factor * length / trained - scaling.factor + 1.0) ** (d / (d - 2))
    plain = torch.tensor([theta ** (-2.0 * j / d) for j in range(d // 2)], dtype=torch.float64)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "longrope":
        factors = scaling.long_factors if length > trained else scaling.short_factors
        return plain / torch.tensor(factors, dtype=torch.float64)
    if scaling.kind == "llama3":
        return torch.tensor([_llama3(f, scaling) for f in plain.tolist()], dtype=torch.float64)
    if scaling.kind == "yarn":
        blend = [_divided_share(j, d, theta, scaling) for j in range(d // 2)]
        divided = torch.tensor(blend, dtype=torch.float64)
        return plain * (1.0 - divided + divided / scaling.factor)
    return plain


def _divided_share(j: int, d: int, theta: float, scaling: RopeScaling) -> float:
    """YaRN: how much of frequency j is divided, from 0 to 1 along the index."""

    def index_of(turns: float) -> float:
        return d * math.log(scaling.trained_positions / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low, high = index_of(scaling.fast_turns), index_of(scaling.slow_turns)
    if scaling.truncates:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return min(1.0, max(0.0, (j - low) / (high - low if high != low else 0.001)))


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    wavelength = 2.0 * math.pi / frequency
    longest = scaling.trained_positions / scaling.low_frequency_factor
    shortest = scaling.trained_positions / scaling.high_frequency_factor
    if wavelength > longest:
        return frequency / scaling.factor
    if wavelength < shortest:
        return frequency
    ratio = scaling.trained_positions / wavelength - scaling.low_frequency_factor
    smooth = ratio / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    return (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
