"""Greedy generation: one prefill over the prompt, then one token at a time over a KV cache.

    prompt tokens + tiles --prefill--> last hidden --logits--> argmax --+
                                           ^                            |
                                           +---- decode, position + 1 --+

The prompt is cut over context parallel ranks as in training; each keeps the keys and values of its shard, and all of
them compute each new token (see `parallel.attention.cached`).

A generated token is text: it advances the position by 1 from the prompt's last one, whatever the strides of
the prompt's images. Dynamic NTK keeps the prompt's base for the whole answer, so that cached keys and new
queries agree (the release changes the base in mid-generation).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, LocalBatch, PackedBatch, tile_share
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.checkpoint.adapters.weights import load_weights
from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_lora
from megatron_v2pe.checkpoint.files.folder import hf_path, read_info
from megatron_v2pe.config.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import ParallelConfig, PositionConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.env import launcher
from megatron_v2pe.inference.kv_cache import KVCache
from megatron_v2pe.inference.prompt import Prompt
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.collect import from_owner
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed, resolve
from megatron_v2pe.parallel.zigzag import shard_indices
from megatron_v2pe.v2pe.layout import Int64Array, pack_layout


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One generated token.

    Attributes:
        token: the most probable one.
        position: whole position of the token that was fed to get it: the prompt's last, then one more each.
        logits: float32 [vocab_size].
    """

    token: int
    position: int
    logits: Tensor


class Engine:
    """A model that answers; every rank of a tensor, pipeline and context parallel world calls it alike.

    Args:
        model: this rank's stage of the model, weights loaded.
        arch: its architecture.
        context: layout of ranks, without sequence parallelism, and this rank's groups.
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
        self.model = model.eval()
        self.arch = arch
        self.context = context
        self.plan = context.plan
        self.ranks = context.ranks
        self.device = context.ranks.device
        self.sharder = BatchSharder(context=context, dtype=dtype, norm=norm)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        mode: Literal["default", "v2pe_fixed"],
        norm: PixelNorm | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        parallel: ParallelConfig | None = None,
    ) -> Engine:
        """Build an engine from a checkpoint folder; under torchrun, one stage or slice of it on each rank.

        Args:
            checkpoint: folder written by `import-hf` or by a run.
            mode: `default` rotates as the checkpoint says and takes whole positions only; `v2pe_fixed`
                rotates by plain frequencies and takes any stride.
            norm: pixel normalisation; None where tiles of prompts are normalised already.
            dtype: compute dtype.
            parallel: sizes of the parallel axes; one rank when None. Sequence parallelism is left out,
                because a single decoded token cannot be split.

        Raises:
            ConfigError: the sizes do not make up the world.
        """
        parallel = replace(parallel or ParallelConfig(), sequence_parallel=False)
        read_info(checkpoint)
        arch = read_architecture(hf_path(checkpoint))
        # The stride of a run's config is a default for data; here every prompt brings its own strides.
        position = PositionConfig(mode=mode, stride=1 if mode == "v2pe_fixed" else 0)
        runtime, lora = RuntimeConfig(dtype=dtype), checkpoint_lora(checkpoint)
        config = RunConfig(position=position, parallel=parallel, runtime=runtime, lora=lora)
        plan = resolve(parallel, launcher().world_size)
        context = init_distributed(plan, seed=config.runtime.seed)
        model_chunks = build_model(config, arch, context)
        load_weights(checkpoint, model_chunks, ranks=context.ranks)
        return cls(model_chunks[0], arch, context=context, dtype=DTYPES[dtype], norm=norm)

    def _prefill_batch(self, prompt: Prompt) -> tuple[LocalBatch, Int64Array]:
        """This rank's share of the prompt, and its index into the prompt, int64 [l]; padding lies at its end."""
        layout = pack_layout([prompt.layout], pad_to_multiple=self.plan.pad_to_multiple)
        length = layout.num_tokens
        start, stop = tile_share(len(prompt.tiles), self.plan.tile_ranks, self.ranks.tile_rank)
        packed = PackedBatch(
            tokens=np.pad(prompt.tokens, (0, length - len(prompt.tokens))),
            labels=np.full(length, IGNORE_INDEX, dtype=np.int64),
            loss_weights=np.zeros(length, dtype=np.float32),
            layout=layout,
            num_tiles=len(prompt.tiles),
            tile_range=(start, stop),
            tiles=prompt.tiles[start:stop],  # type: ignore[arg-type]  # float tiles pass through unnormalised
            sample_ids=("prompt",),
            tile_sizes=self.arch.tile_sizes if self.arch.pyramid else (),
        )
        local = self.sharder.shard(packed)
        index = shard_indices(layout.cu_seqlens, cp=self.plan.cp, cp_rank=self.ranks.cp_rank)
        return replace(local, labels=None, loss_weights=None), index

    def _cache(self, prompt_rows: int, max_new_tokens: int) -> KVCache:
        if self.plan.cp == 1:
            return KVCache(prompt_rows + max_new_tokens)
        turns = -(-max_new_tokens // self.plan.cp)
        return KVCache(prompt_rows + turns, prompt_rows=prompt_rows, group=self.ranks.groups.cp)

    def _decode_batch(self, token: int, position: int, rope_length: int, num_tokens: int) -> LocalBatch:
        units = torch.tensor([position * self.arch.tokens_per_tile], device=self.device)
        return LocalBatch(
            tokens=torch.tensor([[token]], device=self.device),
            labels=None,
            loss_weights=None,
            position_units=units,
            rope_length=rope_length,
            cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
            max_seqlen=num_tokens,
            pixels=None,
            route=None,
        )

    def _logits(self, batch: LocalBatch, row: int | None) -> Tensor:
        """Logits of one row of the batch, float32 [vocab_size] on every rank.

        Args:
            batch: prompt or new token.
            row: local row, None where another context parallel rank has it.
        """
        outputs = run_schedule(
            [self.model], lambda it, model: (model(next(it)), None), [batch], forward_only=True
        )
        mine = None
        if self.ranks.is_last_stage and row is not None:
            mine = self.model.logits(outputs[0][row : row + 1]).squeeze(0)
        return from_owner(mine, shape=(self.arch.language.vocab_size,), ranks=self.ranks)

    @torch.no_grad()
    def stream(self, prompt: Prompt, *, max_new_tokens: int, stop_ids: Collection[int]) -> Iterator[Step]:
        """Yield greedy steps one by one; a stop token ends the answer and is not yielded."""
        batch, index = self._prefill_batch(prompt)
        length = len(prompt.tokens)
        cache = self._cache(int((index < length).sum()), max_new_tokens)
        batch = replace(batch, kv_cache=cache)
        owned = np.flatnonzero(index == length - 1)
        row = int(owned[0]) if len(owned) else None
        position = prompt.layout.next_position - 1
        for count in range(max_new_tokens):
            logits = self._logits(batch, row)
            token = int(logits.argmax())
            if token in stop_ids:
                return
            yield Step(token=token, position=position, logits=logits)
            position += 1
            decode = self._decode_batch(token, position, batch.rope_length, length + count + 1)
            batch, row = replace(decode, kv_cache=cache), 0 if self.ranks.cp_rank == 0 else None

    def generate(self, prompt: Prompt, *, max_new_tokens: int, stop_ids: Collection[int] = ()) -> list[int]:
        """Greedy answer as token ids, without the stop token."""
        steps = self.stream(prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        return [step.token for step in steps]
