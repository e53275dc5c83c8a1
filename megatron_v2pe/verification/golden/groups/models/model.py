"""Forward, loss and gradients of whole models, through the code that `import-hf` and `train` run.

    ckpt/<key> --import_hf--> checkpoint --load_model_weights--> this rank's stage
    case --collate_pack, BatchSharder--> LocalBatch --mcore schedule--> hidden, losses, gradients
    --gathered over ranks--> compared with forward/<key>.safetensors

Tolerances are twice to twenty times what a float64 run of the same code differs by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_v2pe.assembly.optim.optimizer import wrap_data_parallel
from megatron_v2pe.assembly.router_counts import RouterTotals, take_router_totals
from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, LocalBatch, PackedBatch, tile_share
from megatron_v2pe.checkpoint.model_loading import load_model
from megatron_v2pe.config.schema import ParallelConfig, PositionConfig, RunConfig, RuntimeConfig
from megatron_v2pe.config.sections.moe import MoEConfig
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.collect import gather_tokens, max_error_over_ranks
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed, resolve
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.verification.golden.cases import Case, ForwardFile, to_unpadded
from megatron_v2pe.verification.golden.checkpoints import (
    Imported,
    fitting_layout,
    imported_checkpoints,
    is_left_out,
)
from megatron_v2pe.verification.golden.groups.models.experts import (
    JointShares,
    RecordedLogits,
    count_rows,
    joint_loss_row,
    logit_rows,
)
from megatron_v2pe.verification.golden.groups.models.facts import case_row, file_rows
from megatron_v2pe.verification.golden.groups.models.gradients import gradient_rows, whole_gradients
from megatron_v2pe.verification.golden.groups.models.tower import vision_rows
from megatron_v2pe.verification.golden.rows import Row, compared, unsupported

LOGITS_FLOOR = 1e-4  # float32 logits of order 10
LOSS_FLOOR = 1e-5  # float32 losses of order 5
POSITION_ATOL = 1e-4  # float32 positions below 256; a wrong one is off by at least 1/256
REDUCTIONS = ("token", "sample", "square")


def run(folder: Path, *, family: str | None, parallel: ParallelConfig) -> Iterator[Row]:
    """All forward cases; see `rows` for the contract of a model group."""
    plan = resolve(parallel, launcher().world_size)
    checkpoints = imported_checkpoints(folder, family)  # before the world is joined
    context = init_distributed(plan, seed=0)
    for path in sorted((folder / "forward").glob("*.json")):
        if path.stem in checkpoints and not is_left_out(parallel, checkpoints[path.stem]):
            yield from run_file(ForwardFile.open(folder, path), checkpoints[path.stem], parallel=parallel)
    if plan.world_size == 1:
        yield from vision_rows(folder, checkpoints, context)


def run_file(
    file: ForwardFile,
    checkpoint: Imported,
    *,
    parallel: ParallelConfig,
) -> Iterator[Row]:
    """All cases of one checkpoint. Collective; the world has been joined."""
    if isinstance(checkpoint, CheckpointError):
        reason = str(checkpoint).splitlines()[0]
        for case in file.cases():
            yield unsupported(f"model/{file.key}/{case.name}", "all", reason=reason)
        return
    yield from file_rows(file)
    parallel = fitting_layout(parallel, file.architecture())
    context = init_distributed(resolve(parallel, launcher().world_size), seed=0)
    for case in file.cases():
        yield from CaseRun(case, checkpoint, parallel=parallel, context=context).rows()


class CaseRun:
    """One case on this rank.

    Args:
        case: what to run.
        checkpoint: imported weights.
        parallel: the plan as configured.
        context: the plan as resolved, and this rank's place.
    """

    def __init__(
        self, case: Case, checkpoint: Path, *, parallel: ParallelConfig, context: ParallelContext
    ) -> None:
        self.case = case
        self.context = context
        self.plan = context.plan
        self.ranks = context.ranks
        self.sharder = BatchSharder(context=context, dtype=torch.float32)
        self.name = f"model/{case.file.key}/{case.name}"
        # The strides themselves come with the case; this says whether positions may be fractions.
        is_default = case.mode == "default"
        self.arch = case.file.architecture(case.values.get("override"))
        self.config = RunConfig(
            parallel=parallel,
            moe=MoEConfig(aux_loss=0.0),  # the recorded gradients are without it
            position=PositionConfig() if is_default else PositionConfig(mode="v2pe_fixed", stride=1),
            runtime=RuntimeConfig(dtype="float32"),
        )
        self.model_chunks: list[InternVL] = load_model(checkpoint, self.config, self.arch, context)
        self.wrapped = wrap_data_parallel(self.model_chunks, self.config, shard_gradients=False)

    def rows(self) -> Iterator[Row]:
        """Logits, losses and gradients of the case."""
        pack = self.case.pack(pad_to_multiple=self.plan.pad_to_multiple, loss_reduction="token")
        yield case_row(self.name, self.case, pack)
        yield self._compare_positions(pack)
        if self.plan.world_size == 1 and self.case.file.has(f"{self.case.name}/llm_hidden_0"):
            yield from self._compare_hidden_states(pack)
        if self.plan.world_size == 1 and self.arch.language.experts is not None:
            yield from self._compare_router_logits(pack)
        yield self._compare_logits(pack)
        losses = self._train_pass(pack)
        yield from self._compare_losses(pack, losses)
        totals = take_router_totals(self.model_chunks, ranks=self.ranks)
        yield from gradient_rows(self.name, self.case, self._whole_gradients())
        yield from self._compare_reductions(losses)
        if totals is not None:
            yield from self._compare_counts(pack, totals)

    def _shard(self, pack: PackedBatch, *, encodes_tiles: bool) -> LocalBatch:
        local = self.sharder.shard(pack, encodes_tiles=encodes_tiles)
        if not encodes_tiles:
            return local
        start, stop = tile_share(pack.num_tiles, self.plan.tile_ranks, self.ranks.tile_rank)
        return dataclasses.replace(local, pixels=self.case.pixels()[start:stop].to(self.ranks.device))

    def _shard_unlabelled(self, pack: PackedBatch, *, encodes_tiles: bool) -> LocalBatch:
        local = self._shard(pack, encodes_tiles=encodes_tiles)
        return dataclasses.replace(local, labels=None, loss_weights=None)

    def _hidden(self, pack: PackedBatch) -> Tensor | None:
        """Final hidden states of the local tokens on the last stage."""
        runner = MicroBatchRunner(
            shard=self._shard_unlabelled,
            device=self.ranks.device,
        )
        with torch.no_grad():
            outputs = run_schedule(self.model_chunks, runner.forward_step, [pack], forward_only=True)
        return outputs[0] if self.ranks.is_last_stage else None

    def _gather(self, local: Tensor | None, pack: PackedBatch, width: tuple[int, ...]) -> Tensor:
        """Rows of all ranks without padding, on the CPU, where the recorded numbers are."""
        cu_seqlens = pack.layout.cu_seqlens
        whole = gather_tokens(local, cu_seqlens=cu_seqlens, width=width, context=self.context)
        return to_unpadded(whole.cpu(), pack)

    def _compare_hidden_states(self, pack: PackedBatch) -> Iterator[Row]:
        """The decoder's input, each layer's output, and the final norm's instead of the last layer's."""
        decoder = self.model_chunks[0].language.decoder
        states: list[Tensor] = []
        first = decoder.layers[0].register_forward_pre_hook(
            lambda _module, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
        )
        others = [
            module.register_forward_hook(lambda _module, _args, output: states.append(_first(output)))
            for module in [*decoder.layers[:-1], decoder.final_layernorm]
        ]
        self._hidden(pack)
        for hook in (first, *others):
            hook.remove()
        tolerance = self.case.tolerance("logits_maxabs_f32_vs_f64", floor=LOGITS_FLOOR)
        for index, state in enumerate(states):
            wanted = self.case.wanted(f"llm_hidden_{index}")
            error = float((to_unpadded(state.squeeze(1).cpu(), pack) - wanted).abs().max())
            yield compared(self.name, f"llm_hidden_{index}", error=error, tolerance=tolerance)

    def _whole_gradients(self) -> dict[str, Tensor]:
        """Gradients of the last backward pass."""
        return whole_gradients(self.model_chunks, arch=self.arch, ranks=self.ranks)

    def _compare_positions(self, pack: PackedBatch) -> Row:
        """Positions that the last stage's tokens get, as numbers of whole tokens."""
        is_last = self.ranks.is_last_stage
        # float32, as ranks without tokens have it; units of these short packs are exact in it
        units = self._shard(pack, encodes_tiles=False).position_units.float() if is_last else None
        positions = self._gather(units, pack, ()) / self.arch.tokens_per_tile
        error = float((positions - self.case.wanted("position_ids")).abs().max())
        worst = max_error_over_ranks(error, ranks=self.ranks)
        return compared(self.name, "position_ids", error=worst, tolerance=POSITION_ATOL)

    def _compare_counts(self, pack: PackedBatch, totals: RouterTotals) -> Iterator[Row]:
        """Of the training pass: tokens per expert and load balancing losses; then the loss that joins all layers."""
        weight, copies = float(pack.loss_weights.sum()), self.plan.dp
        yield from count_rows(self.name, self.case, totals, weight=weight, copies=copies)
        if "aux_loss" not in self.case.values:
            return
        with JointShares(self.model_chunks, totals):
            self._train_pass(pack, shard=self._shard_unsupervised)
            joint = take_router_totals(self.model_chunks, ranks=self.ranks)
        assert joint is not None
        yield joint_loss_row(self.name, self.case, joint, weight=weight, copies=copies)
        if "aux_grad_l2" in self.case.values:
            yield from gradient_rows(self.name, self.case, self._whole_gradients(), prefix="aux_")

    def _shard_unsupervised(self, pack: PackedBatch, *, encodes_tiles: bool) -> LocalBatch:
        """Without a label; the loss weights stay, by which the routers' losses are weighted."""
        local = self._shard(pack, encodes_tiles=encodes_tiles)
        assert local.labels is not None
        nothing = torch.zeros(0, dtype=torch.int64, device=self.ranks.device)
        labels = torch.full_like(local.labels, IGNORE_INDEX)
        return dataclasses.replace(local, labels=labels, supervised=nothing)

    def _compare_router_logits(self, pack: PackedBatch) -> Iterator[Row]:
        with RecordedLogits(self.model_chunks[0]) as recorded:
            self._hidden(pack)
        tolerance = self.case.tolerance("router_logits_maxabs_f32_vs_f64", floor=LOGITS_FLOOR)
        assert self.arch.language.experts is not None
        num_chosen = self.arch.language.experts.top_k
        yield from logit_rows(
            self.name, self.case, recorded.by_layer, num_chosen=num_chosen, tolerance=tolerance
        )

    def _compare_logits(self, pack: PackedBatch) -> Row:
        hidden = self._hidden(pack)
        with torch.no_grad():
            local = self.model_chunks[-1].logits(hidden) if hidden is not None else None
        logits = self._gather(local, pack, (self.arch.language.vocab_size,))
        error = (logits[self.case.wanted("logit_rows")] - self.case.wanted("logits")).abs().max()
        tolerance = self.case.tolerance("logits_maxabs_f32_vs_f64", floor=LOGITS_FLOOR)
        worst = max_error_over_ranks(float(error), ranks=self.ranks)
        return compared(self.name, "logits", error=worst, tolerance=tolerance)

    def _train_pass(self, pack: PackedBatch, *, shard: Callable[..., LocalBatch] | None = None) -> Tensor:
        """Forward and backward as `train` does; gradients are left in the buffers. Returns losses [t].

        `shard` cuts the pack; None is `_shard`.
        """
        runner = MicroBatchRunner(shard=shard or self._shard, device=self.ranks.device)
        attach(runner, self.wrapped)
        for wrapped_chunk in self.wrapped:
            wrapped_chunk.zero_grad_buffer()
        outputs = run_schedule(self.wrapped, runner.forward_step, [pack])
        local = outputs[0]["losses"].squeeze(0) if self.ranks.is_last_stage else None
        return self._gather(local, pack, ())

    def _compare_losses(self, pack: PackedBatch, losses: Tensor) -> Iterator[Row]:
        wanted = self.case.wanted("per_token_loss")
        error = max_error_over_ranks(float((losses[:-1] - wanted).abs().max()), ranks=self.ranks)
        tolerance = self.case.tolerance("per_token_loss_maxabs", floor=LOSS_FLOOR)
        yield compared(self.name, "per_token_loss", error=error, tolerance=tolerance)
        weights = to_unpadded(torch.from_numpy(pack.loss_weights), pack)
        mean = (losses * weights).sum() / weights.sum()
        error = max_error_over_ranks(abs(float(mean - self.case.wanted("mean_loss"))), ranks=self.ranks)
        yield compared(
            self.name, "mean_loss", error=error, tolerance=self.case.tolerance("loss_abs", floor=LOSS_FLOOR)
        )

    def _compare_reductions(self, losses: Tensor) -> Iterator[Row]:
        """Weighted losses of packed cases, with the weights that collation gives."""
        for reduction in REDUCTIONS:
            if not self.case.file.has(f"{self.case.name}/loss_{reduction}"):
                continue
            pack = self.case.pack(pad_to_multiple=self.plan.pad_to_multiple, loss_reduction=reduction)
            weights = to_unpadded(torch.from_numpy(pack.loss_weights), pack)
            wanted_weights = self.case.wanted(f"loss_weight_{reduction}")[1:]
            # Float32 reciprocals and roots may differ in the last bit between numpy and torch.
            yield compared(
                self.name,
                f"loss_weight_{reduction}",
                error=float((weights[:-1] - wanted_weights).abs().max()),
                tolerance=1e-6,
            )
            loss = (losses * weights).sum() / weights.sum()
            yield compared(
                self.name,
                f"loss_{reduction}",
                error=abs(float(loss - self.case.wanted(f"loss_{reduction}"))),
                tolerance=self.case.tolerance("loss_abs", floor=LOSS_FLOOR),
            )


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Hidden states of a layer, whose second output is unused."""
    return output[0] if isinstance(output, tuple) else output
