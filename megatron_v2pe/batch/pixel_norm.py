"""How pixels are normalised; numbers only."""

from __future__ import annotations

from dataclasses import dataclass

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class PixelNorm:
    """Normalisation of pixels channel by channel: (value / 255 - mean) / std.

    Attributes:
        mean: of the red, green and blue channel, in 0..1.
        std: standard deviation of the three channels.
    """

    mean: Channels
    std: Channels
