"""Our model on this layout's ranks, with what each stage gave, put together on every rank.

    checkpoint --load_model--> this rank's stage --hooks, mcore's schedule--> local slices
    slices --gathered over tp (sequence slices), cp (zigzag), tiles, pp--> whole tensors in token or tile order

Stages are named as in the table that `verify-numerics` prints; `stage_names` is their list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import LocalBatch, PackedBatch, tile_share
from megatron_v2pe.checkpoint.files.folder import expert_bias_of
from megatron_v2pe.checkpoint.model_loading import load_model
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import tower_branches
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.collect import gather_slices, gather_tiles, gather_tokens
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.train.forward_step import MicroBatchRunner
from megatron_v2pe.verification.numerics.inputs import Inputs

EMBEDDING, TOWER, PROJECTOR, DECODER_INPUT = "vision.embedding", "vision", "projector", "decoder.input"
DECODER_NORM, LOGITS = "decoder.norm", "logits"


def vision_stage(number: int) -> str:
    """Name of the output of a vision layer, counted from 1."""
    return f"vision.layer.{number}"


def interaction_stage(interval: int, branch: int) -> str:
    """Name of a branch's patches after an interaction of a pyramid, counted from 0; branch 0 is the large one."""
    return f"vision.interaction.{interval + 1}" + (f".branch.{branch}" if branch else "")


def decoder_stage(number: int) -> str:
    """Name of the output of a decoder layer, counted from 1."""
    return f"decoder.layer.{number}"


def stage_names(arch: InternVLArchitecture, *, every: int) -> list[str]:
    """All stages in the order of the forward pass, with each `every`-th layer; 0 means about eight of each stack."""

    def kept(num_layers: int, name: Callable[[int], str]) -> list[str]:
        step = every or -(-num_layers // 8)
        return [name(number) for number in range(step, num_layers + 1, step)]

    exchanged = []
    if arch.pyramid is not None:
        branches = range(len(arch.pyramid.branches) + 1)
        # After the last interaction smaller branches that are not read are what they were before it.
        exchanged = [
            interaction_stage(interval, branch)
            for interval in range(arch.pyramid.num_interactions)
            for branch in branches
            if not branch or arch.pyramid.both_ways(interval)
        ]
    tower = [*kept(arch.vision.num_layers, vision_stage), *exchanged, TOWER]
    decoder = kept(arch.language.num_layers, decoder_stage)
    return [EMBEDDING, *tower, PROJECTOR, DECODER_INPUT, *decoder, DECODER_NORM, LOGITS]


class CapturedRun:
    """One forward pass.

    Args:
        checkpoint: checkpoint folder.
        arch: its architecture.
        config: the run: layout, positions, dtype.
        context: the layout as resolved, and this rank's place.
        inputs: what the model is given.
        wanted: names of stages to keep.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        arch: InternVLArchitecture,
        config: RunConfig,
        *,
        context: ParallelContext,
        inputs: Inputs,
        wanted: list[str],
    ) -> None:
        self.arch = arch
        self.config = config
        self.context = context
        self.plan = context.plan
        self.ranks = context.ranks
        self.inputs = inputs
        self.wanted = wanted
        self.sharder = BatchSharder(context=context, dtype=DTYPES[config.runtime.dtype])
        if expert_bias_of(checkpoint):
            raise CheckpointError(
                f"{checkpoint}: its routers choose experts with a bias (moe.bias_rate), which the second "
                "implementation does not have; compare the model it started from, or export with --drop-expert-bias"
            )
        self.model_chunks: list[InternVL] = load_model(checkpoint, config, arch, context)
        self._local: dict[str, Tensor] = {}

    def outputs(self) -> dict[str, Tensor]:
        """Stage name -> float32 tensor on the CPU: [t, H] or [n, 1 + P, C], features [n * K, H], logits of text [t, V].

        Collective; the same on every rank.
        """
        pack = self.inputs.pack(pad_to_multiple=self.plan.pad_to_multiple)
        hooks = [hook for model_chunk in self.model_chunks for hook in self._hooks(model_chunk.eval())]
        runner = MicroBatchRunner(shard=self._shard, device=self.ranks.device)
        # On GPUs convolutions would round float32 to 10 bits (tf32); matrix products do not by default.
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            hidden = run_schedule(self.model_chunks, runner.forward_step, [pack], forward_only=True)
            if self.ranks.is_last_stage:
                self._local[LOGITS] = self.model_chunks[-1].logits(hidden[0]).float()
        for hook in hooks:
            hook.remove()
        return {name: self._whole(name, pack).cpu() for name in self.wanted}

    def _shard(self, pack: PackedBatch, *, encodes_tiles: bool) -> LocalBatch:
        """This rank's share, without labels, so that the last stage gives hidden states."""
        local = self.sharder.shard(pack, encodes_tiles=encodes_tiles)
        local = dataclasses.replace(local, labels=None, loss_weights=None)
        if not encodes_tiles:
            return local
        start, stop = tile_share(pack.num_tiles, self.plan.tile_ranks, self.ranks.tile_rank)
        pixels = self.inputs.pixels[start:stop].to(device=self.ranks.device, dtype=self.sharder.dtype)
        return dataclasses.replace(local, pixels=pixels)

    def _hooks(self, model_chunk: InternVL) -> list[Any]:
        """Keep what this model chunk has of the wanted stages."""
        hooks = []
        if model_chunk.vision is not None and model_chunk.projector is not None:
            layers = model_chunk.vision.encoder.layers
            hooks = [
                layers[0].register_forward_pre_hook(
                    lambda _module, _args, kwargs: self._keep(
                        EMBEDDING, kwargs["hidden_states"].transpose(0, 1)
                    ),
                    with_kwargs=True,
                ),
                *[self._hook(layer, vision_stage(layer.layer_number), is_vision=True) for layer in layers],
                *self._interaction_hooks(model_chunk.vision),
                self._hook(model_chunk.vision, TOWER),
                self._hook(model_chunk.projector, PROJECTOR),
                model_chunk.language.register_forward_pre_hook(
                    lambda _module, args: self._keep(DECODER_INPUT, args[1].squeeze(1))
                ),
            ]
        decoder = model_chunk.language.decoder
        hooks += [self._hook(layer, decoder_stage(layer.layer_number)) for layer in decoder.layers]
        if model_chunk.post_process:
            hooks.append(self._hook(decoder.final_layernorm, DECODER_NORM))
        return hooks

    def _interaction_hooks(self, vision: torch.nn.Module) -> list[Any]:
        """Patches of every branch after each interaction of a pyramid."""

        def keeper(interval: int) -> Callable[..., None]:
            def keep(_module: Any, _inputs: Any, output: Any) -> None:
                for branch, patches in enumerate(output):
                    self._keep(interaction_stage(interval, branch), patches)

            return keep

        interactions = getattr(vision, "interactions", ())
        return [module.register_forward_hook(keeper(index)) for index, module in enumerate(interactions)]

    def _hook(self, module: torch.nn.Module, name: str, *, is_vision: bool = False) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            if is_vision:
                x = x.transpose(0, 1)  # [1 + P, n, C] -> [n, 1 + P, C]
            elif name.startswith("decoder"):
                x = x.squeeze(1)  # [r, 1, H] -> [r, H]
            self._keep(name, x)

        return module.register_forward_hook(keep)

    def _keep(self, name: str, value: Tensor) -> None:
        if name in self.wanted:
            self._local[name] = value.detach().float()

    def _whole(self, name: str, pack: PackedBatch) -> Tensor:
        local = self._local.pop(name, None)
        arch = self.arch
        if name.startswith("vision") or name == PROJECTOR:
            width = _width(arch, name)
            tiles = gather_tiles(
                local,
                num_tiles=pack.num_tiles,
                width=width,
                context=self.context,
            )
            return tiles.flatten(0, 1) if name == PROJECTOR else tiles
        if local is not None and self.plan.sequence_parallel and name != LOGITS:
            local = gather_slices(local, ranks=self.ranks)
        size = arch.language.vocab_size if name == LOGITS else arch.language.hidden_size
        cu_seqlens = pack.layout.cu_seqlens
        rows = gather_tokens(local, cu_seqlens=cu_seqlens, width=(size,), context=self.context)
        unpadded = [
            rows[start : start + n] for start, n in zip(cu_seqlens, self.inputs.lengths, strict=False)
        ]
        whole = torch.cat(unpadded)
        return whole[torch.from_numpy(~self.inputs.is_visual)] if name == LOGITS else whole


def _width(arch: InternVLArchitecture, name: str) -> tuple[int, ...]:
    """Rows and channels of a tile at a stage of tower or projector; one row where all branches are read."""
    if name == PROJECTOR:
        return arch.tokens_per_tile, arch.language.hidden_size
    if name == TOWER and arch.reads_all_branches:
        return (sum((rows - 1) * vision.hidden_size for vision, rows in tower_branches(arch)),)
    if name.startswith("vision.interaction."):
        _, has_branch, number = name.partition(".branch.")
        if not has_branch:
            return arch.patches_per_tile - 1, arch.vision.hidden_size
        assert arch.pyramid is not None
        branch = arch.pyramid.branches[int(number) - 1]
        return branch.num_positions - 1, branch.hidden_size
    return arch.patches_per_tile, arch.vision.hidden_size
