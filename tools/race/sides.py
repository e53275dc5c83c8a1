"""The sides of the race: one optimizer step each, on the same weights and the same packed tokens.

ours            `train_step`: cut, forward, backward, reduction, norms, clipping, Adam, numbers of the step
plain           plain PyTorch, logits of supervised tokens only, clip_grad_norm_, AdamW(fused=True)
plain, full     the same with logits of every token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from plain_model import PlainInternVL, Sizes
from weights import copy_weights

from megatron_v2pe.assembly.optim.fused_adam import install_fused_adam
from megatron_v2pe.assembly.optim.optimizer import build_trainer
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.schema import OptimConfig, ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.measured_step import PATCH, PATCHES_PER_SIDE, MeasuredStep, StepSizes
from megatron_v2pe.train.step import train_step
from megatron_v2pe.v2pe.layout import PackLayout, SampleLayout, pack_layout
from megatron_v2pe.v2pe.positions import position_units, visual_rows

MEAN = STD = 0.5  # of the pixels, as in `MeasuredStep`


@dataclass(frozen=True, kw_only=True)
class RaceSizes(StepSizes):
    """A model of an InternViT-300M and an InternLM2 in small, and a pack of one or several documents."""

    ffn: int
    documents: int = 1

    def hugging_face(self) -> dict[str, Any]:
        """Its config.json."""
        values = super().hugging_face()
        tower = dict(norm_type="layer_norm", qkv_bias=True, qk_normalization=False)
        values["vision_config"] |= tower
        values["llm_config"]["intermediate_size"] = self.ffn
        values["ps_version"] = "v2"  # the order of patches in the plain model, and in all released ones
        return values

    def plain(self) -> Sizes:
        """The same for the plain model."""
        language = self.architecture().language
        return Sizes(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            ffn=self.ffn,
            vocab=self.vocab,
            vision_hidden=self.vision_hidden,
            vision_layers=self.vision_layers,
            vision_heads=4,
            patch=PATCH,
            patches_per_side=PATCHES_PER_SIDE,
            rope_base=language.rope_theta,
            norm_eps=language.norm_eps,
        )

    def layout(self, *, pad_to_multiple: int) -> PackLayout:
        """Equal documents, tiles spread over each."""
        one = replace(
            self, tokens=self.tokens // self.documents, tiles=self.tiles // self.documents, documents=1
        )
        sample: SampleLayout = StepSizes.layout(one, pad_to_multiple=pad_to_multiple).documents[0]
        return pack_layout([sample] * self.documents, pad_to_multiple=pad_to_multiple)

    def pack(self, plan: ParallelPlan, tile_rank: int) -> PackedBatch:
        """Every second token has a label less than `supervised` says where documents end."""
        pack = super().pack(plan, tile_rank)
        generator = np.random.default_rng(1)
        labels = np.roll(pack.tokens, -1)
        labels[generator.random(len(labels)) >= self.supervised] = IGNORE_INDEX
        labels[pack.layout.cu_seqlens[1:] - 1] = IGNORE_INDEX
        weights = (labels != IGNORE_INDEX).astype(np.float32)
        return replace(pack, labels=labels, loss_weights=weights)


class Ours:
    """Our step on this rank of a layout."""

    def __init__(
        self, sizes: RaceSizes, *, cp: int = 1, dp: int = 1, micro_batches: int = 1, **runtime: Any
    ) -> None:
        config = RunConfig(
            parallel=ParallelConfig(cp=cp),
            runtime=RuntimeConfig(dtype="float32", **runtime),
            optim=OptimConfig(steps=10**6, lr=1e-5),
        )
        install_fused_adam()
        self.step = MeasuredStep(config=config, sizes=sizes, dp=dp)
        wrapped = self.step.wrapped
        self.trainer = build_trainer([wrapped[0].module], wrapped, config)
        self.batches = [self.step.batch] * micro_batches

    @property
    def model(self) -> Any:
        """The bare model."""
        return self.trainer.model_chunks[0]

    def __call__(self) -> float:
        """One step; its loss."""
        return train_step(self.trainer, self.step.runner, self.batches, ranks=self.step.ranks).loss


class Plain:
    """The plain model's step on the same pack, in this process alone."""

    def __init__(
        self, ours: Ours, sizes: RaceSizes, *, all_rows: bool = False, compiled: bool = False
    ) -> None:
        pack = ours.step.batch
        layout = pack.layout
        whole = np.stack([layout.cu_seqlens[:-1], layout.cu_seqlens[1:]], 1)  # a range for each document
        self.model = PlainInternVL(sizes.plain())
        copy_weights(ours.model, self.model)
        self.all_rows = all_rows
        self.bounds = layout.cu_seqlens.tolist()
        self.inputs = {
            "tokens": torch.from_numpy(pack.tokens),
            "labels": torch.from_numpy(pack.labels),
            "positions": torch.from_numpy(position_units(layout, whole)).double() / layout.tokens_per_tile,
            "slots": torch.from_numpy(visual_rows(layout, whole)[0]),
        }
        self.tiles = torch.from_numpy(pack.tiles)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.model.parameters() if p.dim() > 1]},
                {"params": [p for p in self.model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-5,
            weight_decay=0.05,
            fused=True,
        )
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model

    def __call__(self) -> float:
        """One step; its loss."""
        pixels = (self.tiles.float() / 255 - MEAN) / STD
        loss = self.forward(**self.inputs, bounds=self.bounds, pixels=pixels, all_rows=self.all_rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
