"""Sizes of one InternViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VisionArchitecture:
    """InternViT. Sizes in tokens, channels, pixels."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    image_size: int
    patch_size: int
    norm_type: Literal["layer_norm", "rms_norm"]
    norm_eps: float
    qkv_bias: bool
    qk_normalization: bool

    @property
    def grid(self) -> int:
        """Patches on the side of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding in the checkpoint: patches of `image_size` and the class token."""
        return count_patches(self.image_size, self.patch_size)


def count_patches(image_size: int, patch_size: int) -> int:
    """Patches of a square image and the class token."""
    return (image_size // patch_size) ** 2 + 1
