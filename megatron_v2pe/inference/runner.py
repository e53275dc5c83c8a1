"""This rank's stage of the model on prefill chunks and on new tokens, through mcore's forward-only schedule.

    prompt, chunk --layout, pixels of my tiles--> LocalBatch --stage--> hidden rows that are wanted
    new tokens of b documents                 --> LocalBatch --stage--> hidden rows of all of them

Chunks are the micro batches of the schedule, so that pipeline stages work on different chunks at a time. Nothing of the
prompt's length is made here: tokens, positions and pixels are those of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import LocalBatch, normalized, tile_shape
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.inference.cache.kv_cache import CacheStep, KVCache, KVPlace
from megatron_v2pe.inference.cache.memory import KVKind
from megatron_v2pe.inference.chunks import PrefillChunk
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.routing import ChunkRouter, TileRanks, chunk_pack, chunk_ranges, chunk_route
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.v2pe.layout import Int64Array
from megatron_v2pe.v2pe.positions import position_units


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A micro batch and the local rows whose hidden states are wanted on the last stage."""

    batch: LocalBatch
    rows: Int64Array


class ModelRunner:
    """A model that answers; every rank of a tensor, pipeline and context parallel world calls it alike.

    Args:
        model: this rank's stage of the model, weights loaded; gradients are switched off.
        arch: its architecture.
        context: layout of ranks, without sequence parallelism and virtual stages, and this rank's groups.
        dtype: compute dtype.
        norm: pixel normalisation; None where tiles of prompts are normalised already.
    """

    def __init__(
        self,
        model: InternVL,
        arch: InternVLArchitecture,
        *,
        context: ParallelContext,
        dtype: torch.dtype,
        norm: PixelNorm | None,
    ) -> None:
        self.model, self.arch = model.eval().requires_grad_(False), arch
        self.context, self.plan, self.ranks = context, context.plan, context.ranks
        self.dtype, self.norm, self.device = dtype, norm, context.ranks.device
        group = context.ranks.groups.tp_cp
        self.tile_ranks = TileRanks(size=group.size(), rank=group.rank(), cp=context.plan.cp)
        self.model.route_features = ChunkRouter(group)
        self.problem = ""  # the first image of a prefill that this rank could not read

    def place(self, kind: KVKind) -> KVPlace:
        """Where caches of this rank live."""
        group = self.ranks.groups.cp if self.plan.cp > 1 else None
        return KVPlace(cp=self.plan.cp, cp_rank=self.ranks.cp_rank, group=group, kind=kind)

    def chunk_work(
        self,
        prompt: Prompt,
        chunk: PrefillChunk,
        cache: KVCache,
        *,
        rope_length: int,
        is_first: bool,
        wanted: Int64Array,
    ) -> Work:
        """This rank's share of a chunk, which enters the cache.

        Args:
            prompt: the whole prompt.
            chunk: the chunk.
            cache: of the prompt.
            rope_length: by which dynamic NTK chooses its base.
            is_first: the first chunk of this prefill.
            wanted: rising token indices whose hidden states are wanted.
        """
        layout = prompt.layout
        ranges = chunk_ranges(chunk, cp=self.plan.cp, cp_rank=self.ranks.cp_rank)
        index = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in ranges.tolist()])
        inside = index < layout.num_tokens
        tokens = np.where(inside, prompt.tokens[np.minimum(index, layout.num_tokens - 1)], 0)
        pixels, route = None, None
        if self.ranks.is_first_stage and chunk.last_tile > chunk.first_tile:
            pixels = self._pixels(prompt, chunk)
            route = chunk_route(layout, chunk, tiles=self.tile_ranks, is_first=is_first, device=self.device)
        units = position_units(chunk_pack(layout, chunk), ranges)
        batch = self._batch(tokens, units, rope_length, chunk.padded, cache.note_chunk(chunk))
        rows = np.flatnonzero(inside & np.isin(index, wanted))
        return Work(batch=replace(batch, pixels=pixels, route=route), rows=rows)

    def token_work(
        self, tokens: Sequence[int], positions: Sequence[int], *, rope_length: int, step: CacheStep
    ) -> Work:
        """New tokens, one of each document, at whole positions."""
        units = np.array(positions, dtype=np.int64) * self.arch.tokens_per_tile
        batch = self._batch(np.array(tokens, dtype=np.int64), units, rope_length, len(tokens), step)
        return Work(batch=batch, rows=np.arange(len(tokens), dtype=np.int64))

    def _batch(
        self, tokens: Int64Array, units: Int64Array, rope_length: int, length: int, step: CacheStep
    ) -> LocalBatch:
        return LocalBatch(
            tokens=torch.from_numpy(tokens).to(self.device).unsqueeze(0),
            labels=None,
            loss_weights=None,
            position_units=torch.from_numpy(units).to(self.device),
            rope_length=rope_length,
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=self.device),
            max_seqlen=length,
            pixels=None,
            route=None,
            kv_cache=step,
        )

    def _pixels(self, prompt: Prompt, chunk: PrefillChunk) -> Tensor:
        """Normalised tiles of this rank; black ones where an image cannot be read, which `problem` then says.

        Peers wait for features of these tiles, so the error can only be raised when all of them have come.
        """
        first, last = chunk.tiles_of(self.tile_ranks.rank, self.tile_ranks.size)
        sizes = self.arch.tile_sizes
        tiles: np.ndarray = np.zeros((0, *tile_shape(sizes)), dtype=np.float32)
        if last > first:
            try:
                tiles = prompt.tiles.load(first, last)
            except DataError as error:
                self.problem = self.problem or str(error)
                tiles = np.zeros((last - first, *tile_shape(sizes)), dtype=np.float32)
        pixels = torch.from_numpy(tiles).to(self.device).contiguous()  # channels lay together in memory
        if pixels.dtype == torch.uint8:
            if self.norm is None:
                raise ValueError(
                    "tiles are not normalised, and the engine was loaded without a normalisation"
                )
            pixels = normalized(pixels, self.norm, sizes)
        return pixels.to(self.dtype)

    @torch.no_grad()
    def run(self, make: Sequence[Callable[[], Work]]) -> list[Tensor | None]:
        """Micro batches in order, each made when its turn comes; collective over the replica.

        Returns:
            Hidden states [n, 1, H] of the wanted rows of each on the last stage, None elsewhere.
        """

        def forward_step(iterator: Iterator[Callable[[], Work]], model: InternVL) -> tuple[Tensor, None]:
            work = next(iterator)()
            hidden = model(work.batch)
            # No later stage reads the last one's output: the rows that nobody wants end here.
            return (hidden[torch.from_numpy(work.rows)] if self.ranks.is_last_stage else hidden), None

        outputs = run_schedule([self.model], forward_step, make, forward_only=True)
        return list(outputs) if self.ranks.is_last_stage else [None] * len(make)

    @property
    def first_index(self) -> int:
        """Vocabulary index of the first column of this rank's part of the head."""
        return self.ranks.tp_rank * self.model.language.head_weight().shape[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part of the logits of hidden states [n, 1, H], float32 [n, V / tp]; padding is -inf."""
        weight = self.model.language.head_weight()
        logits = F.linear(hidden.squeeze(1), weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        padding = max(0, min(len(weight), self.first_index + len(weight) - self.arch.language.vocab_size))
        if padding:
            logits[:, len(weight) - padding :] = float("-inf")
        return logits
