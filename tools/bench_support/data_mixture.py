"""The release's mixture as an index without files: published names, sizes and repeats, drawn lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.batch_schedule import constant_batches
from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.plan.epoch_plan import MixturePlan
from megatron_v2pe.data.plan.store import EpochPlan
from megatron_v2pe.data.samples.cost import pack_cost
from megatron_v2pe.data.sources.meta import DatasetEntry

TOKENS_PER_TILE = 256
SHORT, LONG, NEEDLE = (1024, 16384), (1024, 32768), (16384, 32768)
# name -> (repeat_time, samples), by kind
LONG_VQA = {
    "chartqa": (1.251, 40000), "clevr": (0.333, 150000), "deepform": (10.0, 3400), "docvqa": (1.281, 39000),
    "dvqa": (1.0, 150000), "gqa": (0.5, 150000), "infovqa": (2.082, 24000), "kleistercharity": (5.0, 13000),
    "ocrvqa": (0.5, 150000), "okvqa": (5.556, 9000), "svqa": (5.001, 10000), "tabfact": (0.543, 92000),
    "textcaps": (0.456, 110000), "textvqa": (0.876, 57000), "visualmrc": (3.126, 16000), "vizwiz": (2.382, 21000),
    "wikitablequestions": (3.57, 14000),
}  # fmt: skip
MILEBENCH = {
    "GPR1200": (1.0, 1200), "clevr": (1.233, 150000), "iedit": (3.696, 3000), "mmcoqa": (10.0, 3000),
    "mmqa": (3.696, 3000), "objintercn": (3.696, 5000), "ocrvqa": (1.233, 20000), "percept": (12.321, 800),
    "slidevqa": (5.0, 4000), "spotdiff": (2.463, 4000), "sta_charades": (4.929, 5000), "star": (6.159, 43000),
    "tqa": (1.233, 8000), "webqa": (4.929, 2000), "nh_txt_ex": (16.668, 3000), "nh_txt_hd": (8.334, 6000),
    "nh_img_ex": (7.5, 5000), "nh_img_fk": (7.5, 5000), "nh_img_ft": (6.249, 6000), "nh_img_hd": (6.249, 6000),
}  # fmt: skip
LONG_MR = {
    "text_retrieval": (2.0, 30000), "image_retrieval": (4.5, 30000), "text_counting": (4.5, 30000),
    "text_reasoning": (4.5, 30000), "image_counting": (4.5, 30000), "image_jigsaw": (6.0, 15000),
    "image_multiview": (6.0, 15000), "text_retrieval_fake": (4.5, 15000),
}  # fmt: skip


def release_mixture(*, scale: float = 1.0) -> list[DatasetIndex]:
    """Indexes of the 45 data sets, with `scale` times their samples."""
    generator = np.random.default_rng(0)
    kinds = (("long_vqa", LONG_VQA, LONG), ("milebench", MILEBENCH, SHORT), ("long_mr", LONG_MR, NEEDLE))
    indexes = []
    for kind, sets, (low, high) in kinds:
        for name, (repeat, size) in sets.items():
            count = max(1, round(size * scale))
            if kind == "long_mr":
                lengths = generator.integers(low, high + 1, count)
            else:
                lengths = np.exp(generator.uniform(np.log(low), np.log(high), count)).astype(np.int64)
            tiles = (lengths * generator.uniform(0.4, 0.9, count) / TOKENS_PER_TILE).astype(np.int64)
            indexes.append(_index(f"{kind}_{name}", repeat, lengths, tiles))
    return indexes


def _index(name: str, repeat: float, lengths: Any, tiles: Any) -> DatasetIndex:
    count = len(lengths)
    entry = DatasetEntry(
        name=name,
        annotation=f"{name}.jsonl",
        repeat_time=repeat,
        data_augment=True,
    )
    return DatasetIndex(
        entry=entry,
        content=name,
        settings={},
        offsets=np.arange(count),
        line_numbers=np.arange(1, count + 1),
        num_tokens=lengths,
        num_supervised=np.ones(count, dtype=np.int64),
        num_tiles=tiles,
        first_image=np.zeros(count + 1, dtype=np.int64),
        first_medium=np.zeros(count + 1, dtype=np.int64),
        media_images=np.zeros(0, dtype=np.int32),
        sizes=np.zeros((0, 2), dtype=np.int32),
        units=np.zeros((count, 2), dtype=np.int32),
        num_cut=0,
        bad=(),
    )


def plan_of(indexes: list[DatasetIndex], *, pack_tokens: int, batch_size: int) -> MixturePlan:
    """The plan of a run on InternVL2-2B with that pack size."""
    data = DataConfig(max_pack_tokens=pack_tokens, max_pack_tiles=pack_tokens // 128, max_sample_tokens=32768)
    cost = pack_cost(parse_architecture(PUBLISHED["2B"]), trains_vision=True)
    return MixturePlan(indexes, data=data, seed=0, batches=constant_batches(batch_size), cost=cost)


def random_draws(indexes: list[DatasetIndex], epoch: EpochPlan, count: int) -> tuple[Any, Any, Any]:
    """Lengths, tiles and costs of some draws of an epoch, in random order."""
    lengths = np.concatenate([index.num_tokens for index in indexes])
    tiles = np.concatenate([index.num_tiles for index in indexes])
    rows = np.random.default_rng(1).permutation(np.asarray(epoch.rows))[:count]
    cost = pack_cost(parse_architecture(PUBLISHED["2B"]), trains_vision=True)
    return lengths[rows], tiles[rows], cost.of_samples(lengths[rows], tiles[rows])
