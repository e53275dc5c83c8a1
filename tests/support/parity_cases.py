"""What a step is fed with in the parity matrix: packing x where the images lie x position mode.

The contents of a case do not depend on the layout, only the padding of its documents does. Each case has four micro
batches of different lengths; the last has labels at its documents' ends alone, so that whole context parallel shards
have none, and there are fewer tiles than ranks, or none.
"""

import dataclasses
import itertools

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.schema import PositionConfig
from tests.support.packs import IMAGE_TOKEN, feature_rows, layout_of

PADDING_TOKEN = 2
ARCH = parse_architecture(
    {
        "model_type": "internvl_chat",
        "force_image_size": 56,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
            "image_size": 56,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 651,  # no tp size divides it; padded to 704, 768, 768 rows at tp 1, 2, 4
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 48,  # shorter than the documents: positions by default are rescaled
        },
    }
)

# Micro batches of a step: lists of documents; 5 = five text tokens, "2" = an image of two tiles (8 tokens).
DOCUMENTS = {
    ("packed", "spread"): [
        [[5, "2", 9, "1", 20], [7, "1", 3], [33]],
        [[12], [4, "3", 21]],
        [[3, "1", 2, "1", 2, "1", 40], [6, "2", 15]],
        [[18], [5, "4", 8], [2]],
    ],
    ("unpacked", "spread"): [
        [[5, "2", 19, "1", 20, "3", 13]],
        [[60, "2", 9]],
        [[3, "1", 2, "1", 2, "1", 40]],
        [[26, "5", 31]],
    ],
    ("packed", "one shard"): [
        [[1, "2", 87], [12], [30]],
        [[1, "1", 60], [9]],
        [[1, "2", 100], [5]],
        [[1, "1", 70], [3], [3]],
    ],
    ("unpacked", "one shard"): [[[1, "2", 87]], [[1, "1", 60]], [[1, "2", 100]], [[1, "1", 70]]],
    ("packed", "text"): [[[40], [17], [5]], [[9], [70]], [[31], [30]], [[2], [2], [55]]],
    ("unpacked", "text"): [[[62]], [[79]], [[61]], [[59]]],
}
PACKINGS, IMAGES = ("packed", "unpacked"), ("spread", "one shard", "text")
POSITIONS = {
    "default": PositionConfig(),
    "v2pe_fixed": PositionConfig(mode="v2pe_fixed", stride=1),
    "v2pe_random": PositionConfig(mode="v2pe_random"),
}
STRIDES = {"default": (4,), "v2pe_fixed": (1,), "v2pe_random": (3, 1, 4, 2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a step is fed with."""

    packing: str
    images: str
    mode: str

    def __str__(self):
        return f"{self.packing}, {self.images}, {self.mode}"


ALL_CASES = tuple(itertools.starmap(Case, itertools.product(PACKINGS, IMAGES, POSITIONS)))


def covering_cases(*, start):
    """Three cases in which both packings, all images and all modes occur; `start` 0..5 gives other combinations."""
    modes = list(POSITIONS)
    return tuple(
        Case(PACKINGS[(start + i) % 2], images, modes[(start + i) % 3]) for i, images in enumerate(IMAGES)
    )


def pack(case, micro_batch, *, pad_to_multiple, tile_range_of):
    """One micro batch; its contents do not depend on the layout, only its padding does."""
    strides = itertools.cycle(STRIDES[case.mode])
    documents = [
        [span if isinstance(span, int) else f"{span}@{next(strides)}" for span in document]
        for document in DOCUMENTS[case.packing, case.images][micro_batch]
    ]
    layout = layout_of(documents, pad_to_multiple=pad_to_multiple)
    tokens = np.full(layout.num_tokens, PADDING_TOKEN)
    labels = np.full(layout.num_tokens, IGNORE_INDEX)
    weights = np.zeros(layout.num_tokens, dtype=np.float32)
    generator = np.random.default_rng([micro_batch, len(documents)])
    for document, start in zip(layout.documents, layout.cu_seqlens[:-1].tolist(), strict=True):
        length = document.num_tokens
        ids = generator.integers(10, ARCH.language.vocab_size, length + 1)
        shown = generator.random(length) < 0.7 if micro_batch < 3 else np.arange(length) >= length - 4
        shown[-1] = False  # nothing follows a document's last token
        tokens[start : start + length] = ids[:-1]
        labels[start : start + length] = np.where(shown, ids[1:], IGNORE_INDEX)  # shifted: the next token
        weights[start : start + length] = np.where(shown, 0.2 + generator.random(length), 0.0)
    tokens[feature_rows(layout) >= 0] = IMAGE_TOKEN
    first, last = tile_range_of(layout.num_tiles)
    size = (layout.num_tiles, 3, ARCH.image_size, ARCH.image_size)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        loss_weights=weights,
        layout=layout,
        num_tiles=layout.num_tiles,
        tile_range=(first, last),
        tiles=generator.integers(0, 256, size, dtype=np.uint8)[first:last],
        sample_ids=tuple(f"sample-{i}" for i in range(len(documents))),
    )
