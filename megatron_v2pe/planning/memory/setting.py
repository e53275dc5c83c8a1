"""What the memory and the time of a rank follow from: a run, its model, its layout and one pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import linear_tokens
from megatron_v2pe.config.lora import Part, parts_trained_whole
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.sections.parts import PYRAMID
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.shards import Shards, rows_received, sharding_of
from megatron_v2pe.planning.memory.adapters import planned_adapters
from megatron_v2pe.planning.memory.layers.operations import LayerCosts
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.request.workload import Pack

EXPERT_IMBALANCE = 1.25
"""Rows of the fullest rank's experts over an even share, assumed; what it is, `expert_load_by_layer` of a run shows."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the memory of a rank depends on.

    Attributes:
        config: the run.
        arch: its model.
        plan: sizes of the axes.
        pack: the micro batch, padded for the plan.
        backend: `native` or `transformer_engine`.
        on_cpu: torch's CPU costs.
    """

    config: RunConfig
    arch: InternVLArchitecture
    plan: ParallelPlan
    pack: Pack
    backend: str
    on_cpu: bool = False

    @property
    def attention_backend(self) -> str:
        """Of the decoder's attention: native where there are sinks, also among Transformer Engine's layers."""
        return "native" if self.arch.language.sinks else self.backend

    @property
    def element_bytes(self) -> int:
        """Of the compute dtype."""
        return 2 if self.config.runtime.dtype == "bfloat16" else 4

    @cached_property
    def shards(self) -> Shards:
        """The pack, cut as the run cuts it."""
        bounds = np.concatenate([[0], np.cumsum(self.pack.document_lengths, dtype=np.int64)])
        return sharding_of(self.config.parallel, self.arch).shards(bounds, cp=self.plan.cp)

    @property
    def tokens(self) -> int:
        """Tokens of the fullest rank after the context parallel cut (l)."""
        return self._most(self.shards.tokens)

    @property
    def longest_local(self) -> int:
        """Tokens of the longest document, or part of one, that a rank holds."""
        return self._most(lambda rank: max(self.shards.local_lengths(rank)))

    @property
    def received_rows(self) -> int:
        """Tokens whose keys and values the busiest rank gets from others in a forward pass of p2p or all_gather."""
        shards = self.shards
        holders = shards.holders
        if holders is None:
            return (self.plan.cp - 1) * self.tokens
        return self._most(lambda rank: rows_received(shards.lengths, holders, rank))

    @cached_property
    def slowest_rank(self) -> tuple[int, float]:
        """Tokens of the context parallel rank that works longest on a pack, and its attention over the mean.

        By attention and linears; where every document is cut over all ranks, they are alike.
        """
        shards = self.shards
        if shards.holders is None:
            return self.tokens, 1.0
        pairs = [0] * self.plan.cp
        for length, ranks in zip(shards.lengths, shards.holders, strict=True):
            for rank in ranks:
                pairs[rank] += length * length // len(ranks)
        balance = linear_tokens(self.arch)
        slowest = max(range(self.plan.cp), key=lambda rank: pairs[rank] + balance * shards.tokens(rank))
        return shards.tokens(slowest), pairs[slowest] * self.plan.cp / sum(pairs)

    def _most(self, of_rank: Callable[[int], int]) -> int:
        return max(of_rank(rank) for rank in range(self.plan.cp))

    @property
    def rows(self) -> int:
        """Rows between layers (r)."""
        return self.tokens // (self.plan.tp if self.plan.sequence_parallel else 1)

    @property
    def tiles(self) -> int:
        """Tiles that the busiest rank encodes, blank ones included; a rank without tiles encodes a blank one."""
        multiple = self.config.vision.tile_multiple
        return max(1, -(-self.pack.num_tiles // (self.plan.tile_ranks * multiple))) * multiple

    @property
    def fused_swiglu(self) -> bool:
        """Whether MLPs of the decoder keep only their first linear's output."""
        swiglu = self.config.model.swiglu
        return swiglu == "fused" or (swiglu == "auto" and not self.on_cpu)

    @property
    def routed_rows(self) -> float:
        """Rows that the experts of a rank get in a layer, at most: its even share times `EXPERT_IMBALANCE`."""
        experts = self.arch.language.experts
        return EXPERT_IMBALANCE * self.rows * self.plan.etp * experts.top_k if experts else 0.0

    def trains(self, part: Part) -> bool:
        """Whether a part's own weights are trained."""
        return part in parts_trained_whole(self.config)

    def has_gradients(self, part: Part) -> bool:
        """Whether a part, or its adapters, get gradients."""
        return self.trains(part) or self.config.lora.rank_of(part) > 0

    @property
    def trains_pyramid(self) -> bool:
        """Whether smaller branches and interactions around the tower are there and trained."""
        trained = parts_trained_whole(self.config)
        return self.arch.pyramid is not None and ("vision" in trained or PYRAMID in trained)

    def fp8_layers(self, model_chunk: ModelChunk) -> int:
        """Decoder layers of a model chunk whose linears multiply in FP8."""
        model, last = self.config.model, self.arch.language.num_layers - self.config.model.fp8_skip_layers
        if model.fp8 == "none":
            return 0
        first = model_chunk.first_layer
        return sum(model.fp8_skip_layers <= first + index < last for index in range(model_chunk.num_layers))

    def costs(self, part: Part) -> LayerCosts:
        """What the back end's modules allocate for a part, in the compute dtype."""
        fused = self.backend == "transformer_engine"
        return LayerCosts(
            element_bytes=self.element_bytes,
            fused_norm=fused,
            float_attention=self.on_cpu,
            expands_keys=not fused,
            is_trained=self.trains(part),
            adapters=planned_adapters(self.config.lora, part, self.arch).pairs,
            drops_inputs=self.config.lora.dropout > 0,
        )
