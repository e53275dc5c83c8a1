"""How far a visual token advances the position: fixed by the user, or drawn for each image.

The paper trains with delta drawn per image from {1, 1/2, ..., 1/256} (release: `v2pe_rnd`), and picks one
delta at inference. A draw depends on (seed, epoch, sample id) only, so it is the same on every rank and in
every loader worker, and a resumed run repeats it; the release draws from global state, so ranks and restarts differ.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_v2pe.config.position_modes import PositionMode
from megatron_v2pe.v2pe.layout import Int64Array


def stride_choices(tokens_per_tile: int) -> Int64Array:
    """Powers of two up to tokens_per_tile: 1, 2, 4, ..., 256 for 256 tokens per tile."""
    return 2 ** np.arange(int(np.log2(tokens_per_tile)) + 1, dtype=np.int64)


def sample_generator(seed: int, epoch: int, sample_id: str) -> np.random.Generator:
    """Generator that depends on the run seed, the epoch and the sample's identity, and on nothing else."""
    digest = hashlib.blake2b(sample_id.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, epoch, int.from_bytes(digest, "little")])


def image_strides(
    mode: PositionMode,
    num_images: int,
    *,
    tokens_per_tile: int,
    stride: int | None = None,
    generator: np.random.Generator | None = None,
) -> Int64Array:
    """Stride of each image of a sample, in position units.

    Args:
        mode: `default` gives tokens_per_tile (a visual token counts as much as a text token),
            `v2pe_fixed` gives `stride`, `v2pe_random` draws uniformly from `stride_choices`.
        num_images: images of the sample.
        tokens_per_tile: visual tokens of one tile.
        stride: needed by `v2pe_fixed`, at least 1.
        generator: needed by `v2pe_random`; see `sample_generator`.

    Returns:
        int64 [num_images].
    """
    if mode == "default":
        return np.full(num_images, tokens_per_tile, dtype=np.int64)
    if mode == "v2pe_fixed":
        if stride is None or stride < 1:
            raise ValueError(f"v2pe_fixed needs a stride of at least 1, got {stride}")
        return np.full(num_images, stride, dtype=np.int64)
    if generator is None:
        raise ValueError("v2pe_random needs a generator")
    return generator.choice(stride_choices(tokens_per_tile), size=num_images)
