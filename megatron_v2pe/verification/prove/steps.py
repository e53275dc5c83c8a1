"""The same steps under any layout, and how far they are from those of one rank.

    one rank    steps --> losses, gradient norms, whole gradients and weights
    N ranks     steps --> every rank compares its slices with the whole tensors --> largest errors

Steps are those of `train`: `build_model`, `wrap_for_training`, `BatchSharder`, `train_step`. In float64 there is no
optimizer, whose state is float32: one forward and backward pass gives loss and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_v2pe.assembly import build
from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.optim.optimizer import wrap_data_parallel, wrap_for_training
from megatron_v2pe.assembly.optim.whole_gradients import gather_gradients
from megatron_v2pe.assembly.schedule import StageRows, run_schedule
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.shards import sharding_of
from megatron_v2pe.parallel.topology import ParallelContext
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.train.step import mean_losses, train_step
from megatron_v2pe.verification.prove import slices
from megatron_v2pe.verification.prove.slices import LocalSlice

NORM = PixelNorm((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
Error = tuple[float, str]
"""A relative deviation, and the parameter or step that has it."""


@dataclass
class Outcome:
    """What steps gave on this rank: `gradients` of the first, `weights` after each, as slices.

    `norms` are those of `train_step`, `norms_of_mcore` megatron-core's own; both are empty without an optimizer.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    norms_of_mcore: list[float] = field(default_factory=list)
    gradients: list[LocalSlice] = field(default_factory=list)
    weights: list[list[LocalSlice]] = field(default_factory=list)


def _runner(config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> MicroBatchRunner:
    sharder = BatchSharder(
        context=context,
        dtype=DTYPES[config.runtime.dtype],
        norm=NORM,
        sharding=sharding_of(config.parallel, arch),
    )
    return MicroBatchRunner(shard=sharder.shard, device=context.ranks.device, rows=sharder.rows)


def run_steps(
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
    packs: Sequence[PackedBatch],
    *,
    steps: int = 2,
) -> Outcome:
    """Build, place weights (`slices.draw`), update `steps` times on the same packs. Collective.

    Args:
        config: the run, in float32.
        arch: of the model.
        context: sizes of the axes and this rank's place on them.
        packs: this data parallel rank's micro batches of a step.
        steps: updates.
    """
    ranks = context.ranks
    model_chunks = build.build_model(config, arch, context)
    slices.place(model_chunks, ranks, vocab_size=arch.language.vocab_size)
    trainer = wrap_for_training(model_chunks, config)
    runner = _runner(config, arch, context)
    attach(runner, trainer.wrapped)
    outcome = Outcome()
    optimizer: Any = trainer.optimizer
    prepare = optimizer.prepare_grads

    def keep_gradients_then_prepare() -> Any:
        if not outcome.gradients:
            gather_gradients(trainer.wrapped)
            with slices.gradients_in_place(model_chunks):
                outcome.gradients = _copies(slices.slices_of(model_chunks, ranks))
        found_inf = prepare()
        outcome.norms_of_mcore.append(float(optimizer.get_grad_norm()))
        return found_inf

    optimizer.prepare_grads = keep_gradients_then_prepare
    for _ in range(steps):
        report = train_step(trainer, runner, packs, ranks=ranks)
        outcome.losses.append(report.loss)
        outcome.norms.append(report.grad_norm)
        if config.parallel.overlap_param_gather:  # else they would arrive in the next forward pass
            for chunk in trainer.wrapped:
                chunk.start_param_sync(force_sync=True)
        outcome.weights.append(_copies(slices.slices_of(model_chunks, ranks)))
    return outcome


def run_backward(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext, packs: Sequence[PackedBatch]
) -> Outcome:
    """Build, place weights, one forward and backward pass, for any dtype. Collective; see `run_steps`."""
    ranks = context.ranks
    model_chunks = build.build_model(config, arch, context)
    slices.place(model_chunks, ranks, vocab_size=arch.language.vocab_size)
    wrapped = wrap_data_parallel(model_chunks, config, shard_gradients=False)
    runner = _runner(config, arch, context)
    attach(runner, wrapped)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    rows = runner.rows
    assert rows is not None
    stages = StageRows(rows=[rows(pack) for pack in packs], groups=ranks.groups)
    outputs = run_schedule(wrapped, runner.forward_step, packs, stages=stages)
    loss, _ = mean_losses(outputs, packs, runner=runner, ranks=ranks)
    with slices.gradients_in_place(model_chunks):
        return Outcome(losses=[loss], gradients=_copies(slices.slices_of(model_chunks, ranks)))


def _copies(found: Sequence[LocalSlice]) -> list[LocalSlice]:
    return [(key, where, shape, data.clone()) for key, where, shape, data in found]


def wholes(outcome: Outcome, *, vocab_size: int) -> dict[str, Any]:
    """What one rank's outcome gives for `compare`: whole tensors and the sizes that errors are relative to."""
    gradients = slices.whole_of(outcome.gradients, vocab_size=vocab_size)
    weights = [slices.whole_of(found, vocab_size=vocab_size) for found in outcome.weights]
    first = {key: slices.draw(key, tensor.shape) for key, tensor in gradients.items()}
    return dict(
        losses=outcome.losses,
        norms=outcome.norms,
        gradients=gradients,
        weights=weights,
        gradient_scales=slices.largest(gradients),
        update_scales=[slices.largest({key: after[key] - first[key] for key in first}) for after in weights],
    )


def compare(outcome: Outcome, wanted: Mapping[str, Any]) -> dict[str, Error]:
    """Largest errors of this rank: "loss", "gradient", and "norm" and "weight N" where there was an optimizer.

    Args:
        outcome: of this rank; of the first steps where the other has more.
        wanted: what one rank gave, see `wholes`.
    """
    found = {
        "loss": _relative(outcome.losses, wanted["losses"]),
        "gradient": _worst(
            slices.errors(outcome.gradients, wanted["gradients"], scales=wanted["gradient_scales"])
        ),
    }
    if outcome.norms:
        found["norm"] = _relative(outcome.norms, wanted["norms"])
    for number, weights in enumerate(outcome.weights):
        scales = wanted["update_scales"][number]
        found[f"weight {number + 1}"] = _worst(
            slices.errors(weights, wanted["weights"][number], scales=scales)
        )
    return found


def is_same_step(outcome: Outcome, other: Outcome) -> bool:
    """Whether two runs have the same first step on this rank, to the bit."""
    numbers = (outcome.losses[0], outcome.norms[0]), (other.losses[0], other.norms[0])
    pairs = zip([*outcome.gradients, *outcome.weights[0]], [*other.gradients, *other.weights[0]], strict=True)
    return numbers[0] == numbers[1] and all(torch.equal(one[3], two[3]) for one, two in pairs)


def _relative(values: Sequence[float], wanted: Sequence[float]) -> Error:
    # The norm is 0 where a step without images trains vision alone.
    deviations = [abs(a - b) / (abs(b) or 1.0) for a, b in zip(values, wanted, strict=False)]
    return max(
        (value if math.isfinite(value) else math.inf, f"step {i + 1}") for i, value in enumerate(deviations)
    )


def _worst(by_key: Mapping[str, float]) -> Error:
    key = max(by_key, key=lambda name: by_key[name])
    return by_key[key], key
