"""Means and deviations by which the pixels of a vision tower are normalised."""

from __future__ import annotations

from typing import Literal

from megatron_v2pe.batch.pixel_norm import PixelNorm

NormalizeType = Literal["imagenet", "clip", "siglip"]

NORMALIZATION: dict[NormalizeType, PixelNorm] = {
    "imagenet": PixelNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": PixelNorm((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def mean_color(normalize_type: NormalizeType) -> tuple[int, int, int]:
    """The mean of the normalisation as an 8-bit color, rounded down as in the release."""
    red, green, blue = (int(channel * 255) for channel in NORMALIZATION[normalize_type].mean)
    return red, green, blue
