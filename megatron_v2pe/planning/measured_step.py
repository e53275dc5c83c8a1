"""A training step of a small model with random weights, and the memory it needs: what the planner is checked against.

    StepSizes --architecture--> build_model --> DDP               (nothing is read from disk)
    pack of text and tiles --BatchSharder--> schedule: forward and backward

Memory is counted by torch's profiler, which sees every allocation and release of torch's CPU allocator, temporaries
inside operators included. `peak_bytes` is the most that was allocated at a time beyond what existed at the start, so
weights, gradient buffers and optimizer state do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.optim.optimizer import wrap_data_parallel
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch, tile_shape, tile_share
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.shards import sharding_of
from megatron_v2pe.parallel.topology import ParallelPlan, Ranks, init_distributed, resolve
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.v2pe.layout import PackLayout, SampleLayout, pack_layout

PATCH, PATCHES_PER_SIDE = 14, 8
TILE_PIXELS = PATCH * PATCHES_PER_SIDE  # 112
TOKENS_PER_TILE = (PATCHES_PER_SIDE // 2) ** 2  # 16


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """A model and a pack: one document of text with tiles spread over it."""

    tokens: int = 4096
    tiles: int = 32
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 2048
    vision_hidden: int = 128
    vision_layers: int = 4
    supervised: float = 0.25
    """Share of the tokens that have a label, at the end of the document."""
    pyramid: dict[str, Any] | None = None
    """`piip_config` of a model with a pyramid."""

    def architecture(self) -> InternVLArchitecture:
        """The model."""
        return parse_architecture(self.hugging_face())

    def hugging_face(self) -> dict[str, Any]:
        """Its config.json."""
        pyramid = {"piip_config": self.pyramid} if self.pyramid else {}
        return {
            **pyramid,
            "model_type": "internvl_chat",
            "force_image_size": TILE_PIXELS,
            "vision_config": {
                "hidden_size": self.vision_hidden,
                "num_hidden_layers": self.vision_layers,
                "num_attention_heads": 4,
                "intermediate_size": 4 * self.vision_hidden,
                "patch_size": PATCH,
                "image_size": TILE_PIXELS,
            },
            "llm_config": {
                "architectures": ["InternLM2ForCausalLM"],
                "hidden_size": self.hidden,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": 4 * self.hidden,  # the ratio of InternLM2-1.8B
                "vocab_size": self.vocab,
            },
        }

    def layout(self, *, pad_to_multiple: int) -> PackLayout:
        """The pack's document."""
        per_tile = self.architecture().tokens_per_tile
        text = self.tokens - self.tiles * per_tile
        if text <= self.tiles:
            raise ConfigError(
                f"{self.tiles} tiles of {per_tile} tokens leave no text in {self.tokens} tokens; use fewer tiles"
            )
        number = np.arange(self.tiles)
        starts = number * per_tile + (number + 1) * text // (self.tiles + 1)
        sample = SampleLayout(
            num_tokens=self.tokens,
            image_starts=starts.astype(np.int64),
            num_tiles=np.ones(self.tiles, np.int64),
            strides=np.full(self.tiles, per_tile, np.int64),
            tokens_per_tile=per_tile,
        )
        return pack_layout([sample], pad_to_multiple=pad_to_multiple)

    def pack(self, plan: ParallelPlan, tile_rank: int) -> PackedBatch:
        """The pack as the loader would give it to a rank: random tokens and pixels."""
        layout = self.layout(pad_to_multiple=plan.pad_to_multiple)
        generator = np.random.default_rng(0)
        share = tile_share(self.tiles, plan.tile_ranks, tile_rank)
        tokens = generator.integers(0, self.vocab, layout.num_tokens)
        labels = np.roll(tokens, -1)
        labels[: round((1 - self.supervised) * len(labels))] = IGNORE_INDEX
        tile_sizes = self.architecture().tile_sizes
        shape = (share[1] - share[0], *tile_shape(tile_sizes))
        return PackedBatch(
            tokens=tokens,
            labels=labels,
            loss_weights=(labels != IGNORE_INDEX).astype(np.float32),
            layout=layout,
            num_tiles=self.tiles,
            tile_range=share,
            tiles=generator.integers(0, 256, shape, dtype=np.uint8),
            tile_sizes=tile_sizes,
            sample_ids=("benchmark",),
        )


@dataclass(kw_only=True)
class MeasuredStep:
    """Forward and backward of one rank, ready to be called again and again.

    Attributes:
        config: the run.
        sizes: model and pack.
        change: called with the model before it is wrapped.
        dp: data parallel ranks.
        plan: the layout.
        ranks: this rank's place in it.
    """

    config: RunConfig
    sizes: StepSizes
    change: Callable[[Any], None] | None = None
    dp: int = 1
    plan: ParallelPlan = field(init=False)
    ranks: Ranks = field(init=False)

    def __post_init__(self) -> None:
        parallel = self.config.parallel
        self.plan = resolve(parallel, parallel.tp * parallel.pp * parallel.cp * self.dp)
        context = init_distributed(self.plan, seed=0)
        self.ranks = context.ranks
        (model,) = build_model(self.config, self.sizes.architecture(), context)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.02)
        if self.change is not None:
            self.change(model)
        self.wrapped = wrap_data_parallel([model], self.config, shard_gradients=True)
        self.wrapped[0].train()
        self.batch = self.sizes.pack(self.plan, self.ranks.tile_rank)
        is_half = self.config.runtime.dtype == "bfloat16"
        sharder = BatchSharder(
            context=context,
            dtype=torch.bfloat16 if is_half else torch.float32,
            norm=PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            sharding=sharding_of(parallel, self.sizes.architecture()),
        )
        self.runner = MicroBatchRunner(shard=sharder.shard, device=self.ranks.device)
        attach(self.runner, self.wrapped)

    def __call__(self) -> None:
        """Forward, backward, reduction of the gradients. Collective."""
        self.wrapped[0].zero_grad_buffer()
        self.runner.reset()
        run_schedule(self.wrapped, self.runner.forward_step, [self.batch])


def peak_bytes(action: Callable[[], Any]) -> int:
    """Most bytes of torch tensors that `action` held at a time, beyond those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))
