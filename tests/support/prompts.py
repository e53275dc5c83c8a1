"""Prompts and engines for tests of inference."""

from pathlib import Path

import numpy as np

from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.tiles import ArrayTiles
from megatron_v2pe.v2pe.layout import SampleLayout

GOLDEN = Path(__file__).parents[1] / "golden" / "ckpt"
FAMILY = "a_internlm2_vit300m"


def random_prompt(arch, pieces, *, seed=0, stride=1, image_seed=None):
    """A prompt of text lengths and ("image", tiles) pieces with random tokens and normalised pixels."""
    generator = np.random.default_rng(seed)
    pixels_of = np.random.default_rng(seed if image_seed is None else image_seed)
    tokens, starts, tiles = [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += generator.integers(10, min(500, arch.language.vocab_size), size=piece).tolist()
        else:
            starts.append(len(tokens))
            tiles.append(piece[1])
            tokens += [0] * piece[1] * arch.tokens_per_tile
    layout = SampleLayout(
        num_tokens=len(tokens),
        image_starts=np.array(starts, dtype=np.int64),
        num_tiles=np.array(tiles, dtype=np.int64),
        strides=np.full(len(tiles), stride, dtype=np.int64),
        tokens_per_tile=arch.tokens_per_tile,
    )
    size = arch.image_size
    pixels = pixels_of.standard_normal((sum(tiles), 3, size, size), dtype=np.float32)
    return Prompt(tokens=np.array(tokens, dtype=np.int64), layout=layout, tiles=ArrayTiles(pixels, tiles))


def load_engine(checkpoint, *, mode="v2pe_fixed", **options):
    """An engine on pixels that are normalised already."""
    return Engine.load(checkpoint, mode=mode, **options)
