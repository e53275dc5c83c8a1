"""Weights, gradients and optimizer state of a rank, to the byte, as mcore lays them out.

    weights     one buffer of all trained parameters of a model chunk, in the compute dtype; frozen parameters beside it
    gradients   one buffer of the same length, float32
    optimizer   this rank's 1 / (dp * cp) of the buffer: float32 copy (bf16 runs), first and second moment

mcore fills a buffer from the last parameter to the first, starts each at a multiple of 64 numbers, and ends each
bucket at a multiple of lcm(dp * cp, 128), so that ranks get equal shares. There is one bucket, but for a tied
embedding that two stages hold: it has one of its own. Gaps between parameters have gradients, and no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import PARTS, is_adapter_parameter, parts_trained_whole
from megatron_v2pe.config.schema import LoRAConfig, ModelConfig, RunConfig
from megatron_v2pe.config.sections.parts import PYRAMID, part_of
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.memory.adapters import ParameterSize
from megatron_v2pe.planning.memory.parameters import is_expert, model_chunk_parameters
from megatron_v2pe.planning.request.stages import ModelChunk, model_chunks_of_rank

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MAIN_WEIGHT_BYTES = 4
FP8_COPY_BYTES = 2
_LAYERS = "language.decoder.layers."


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A range of the buffer that is reduced as one.

    Attributes:
        length: numbers, gaps included; a multiple of the ranks that share the optimizer.
        parameters: half-open ranges of the bucket that parameters fill.
    """

    length: int
    parameters: tuple[tuple[int, int], ...]


def fill_buckets(
    sizes: Sequence[int], *, sharing_ranks: int, own_bucket: frozenset[int] = frozenset()
) -> list[Bucket]:
    """Lay out parameters as mcore's `_ParamAndGradBuffer` does.

    Args:
        sizes: numbers of each trained parameter, in order of the model.
        sharing_ranks: dp * cp.
        own_bucket: indices of parameters that get a bucket of their own (tied embeddings over stages).
    """
    buckets: list[Bucket] = []
    runs: list[tuple[int, int]] = []
    for index in reversed(range(len(sizes))):
        if index in own_bucket and runs:
            buckets.append(_close(runs, sharing_ranks))
            runs = []
        start = _round_up(runs[-1][1] if runs else 0, PARAMETER_ALIGNMENT)
        runs.append((start, start + sizes[index]))
        if index in own_bucket:
            buckets.append(_close(runs, sharing_ranks))
            runs = []
    return [*buckets, _close(runs, sharing_ranks)] if runs else buckets


def _close(runs: list[tuple[int, int]], sharing_ranks: int) -> Bucket:
    length = _round_up(runs[-1][1], math.lcm(sharing_ranks, BUCKET_ALIGNMENT))
    return Bucket(length=length, parameters=tuple(runs))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def shard_numbers(buckets: Sequence[Bucket], *, sharing_ranks: int, sharing_rank: int) -> int:
    """Numbers of parameters in a rank's share of each bucket; gaps do not count."""
    total = 0
    for bucket in buckets:
        share = bucket.length // sharing_ranks
        first, stop = sharing_rank * share, (sharing_rank + 1) * share
        total += sum(max(0, min(end, stop) - max(begin, first)) for begin, end in bucket.parameters)
    return total


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that a rank holds for the whole run."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    fp8_bytes: int = 0
    """Copies of weights in FP8, by rows and by columns."""

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.fp8_bytes

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            weights_bytes=self.weights_bytes + other.weights_bytes,
            gradients_bytes=self.gradients_bytes + other.gradients_bytes,
            optimizer_bytes=self.optimizer_bytes + other.optimizer_bytes,
            fp8_bytes=self.fp8_bytes + other.fp8_bytes,
        )


def is_trained_name(parameter: str, frozen: frozenset[str]) -> bool:
    """Whether a parameter is trained, by its name and the parts that are not."""
    return part_of(parameter) not in frozen or is_adapter_parameter(parameter)


@lru_cache(maxsize=256)
def state_bytes(
    parameters: tuple[ParameterSize, ...],
    *,
    element_bytes: int,
    sharing_ranks: int,
    sharing_rank: int = 0,
    frozen: frozenset[str] = frozenset(),
    own_bucket: frozenset[str] = frozenset(),
) -> StateBytes:
    """State of one model chunk on the rank `sharing_rank` of the dp * cp ranks that share its optimizer.

    Args:
        parameters: see `parameters.chunk_parameters`.
        element_bytes: 2 for bfloat16, 4 for float32.
        sharing_ranks: dp * cp.
        sharing_rank: which of them.
        frozen: parts (`part_of`) whose own weights are not trained; adapters always are.
        own_bucket: names that get a bucket of their own.
    """
    frozen_sizes = [size for name, size in parameters if not is_trained_name(name, frozen)]
    trained = [(name, size) for name, size in parameters if is_trained_name(name, frozen)]
    alone = frozenset(index for index, (name, _) in enumerate(trained) if name in own_bucket)
    buckets = fill_buckets([size for _, size in trained], sharing_ranks=sharing_ranks, own_bucket=alone)
    length = sum(bucket.length for bucket in buckets)
    shard = shard_numbers(buckets, sharing_ranks=sharing_ranks, sharing_rank=sharing_rank)
    per_number = MOMENT_BYTES + (MAIN_WEIGHT_BYTES if element_bytes < MAIN_WEIGHT_BYTES else 0)
    return StateBytes(
        weights_bytes=(length + sum(frozen_sizes)) * element_bytes,
        gradients_bytes=length * GRADIENT_BYTES,
        optimizer_bytes=shard * per_number,
    )


TIED = frozenset({"language.embedding.word_embeddings.weight", "language.output_layer.weight"})


def frozen_parts(config: RunConfig) -> frozenset[str]:
    """Parts whose own weights are not trained, as `part_of` names them."""
    trained = frozenset(parts_trained_whole(config))
    return frozenset((*PARTS, PYRAMID)) - trained - ({PYRAMID} if "vision" in trained else set())


def own_bucket(arch: InternVLArchitecture, plan: ParallelPlan) -> frozenset[str]:
    """Parameters with a bucket of their own: a tied embedding that first and last stage both hold."""
    return TIED if arch.language.tie_word_embeddings and plan.pp > 1 else frozenset()


def rank_state(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan, rank: int) -> StateBytes:
    """State of a rank of the world; rank = ((pp * dp + dp) * cp + cp) * tp + tp."""
    sharing_ranks = plan.dp * plan.cp
    pp_rank, rest = divmod(rank, sharing_ranks * plan.tp)
    total = StateBytes(weights_bytes=0, gradients_bytes=0, optimizer_bytes=0)
    for model_chunk in model_chunks_of_rank(config.parallel, arch.language.num_layers, plan, pp_rank):
        parameters = model_chunk_parameters(arch, plan, model_chunk, config.lora)
        element_bytes = 2 if config.runtime.dtype == "bfloat16" else 4
        frozen = frozen_parts(config)
        total = total + state_bytes(
            tuple(each for each in parameters if not is_expert(each[0])),
            element_bytes=element_bytes,
            sharing_ranks=sharing_ranks,
            sharing_rank=rest // plan.tp,
            frozen=frozen,
            own_bucket=own_bucket(arch, plan),
        )
        experts = tuple(each for each in parameters if is_expert(each[0]))
        if experts:
            total = total + state_bytes(
                experts,
                element_bytes=element_bytes,
                sharing_ranks=plan.expert_dp,
                sharing_rank=rest // (plan.etp * plan.ep),
                frozen=frozen,
            )
        total = replace(
            total, fp8_bytes=total.fp8_bytes + _fp8_bytes(config.model, parameters, model_chunk, arch)
        )
    return total


def _fp8_bytes(
    model: ModelConfig,
    parameters: tuple[ParameterSize, ...],
    model_chunk: ModelChunk,
    arch: InternVLArchitecture,
) -> int:
    """Two bytes for each weight of the decoder's linears that multiply in FP8."""
    if model.fp8 == "none":
        return 0
    first, end = model.fp8_skip_layers, arch.language.num_layers - model.fp8_skip_layers
    layers = (f"{_LAYERS}{index}." for index in range(model_chunk.num_layers))
    kept = tuple(
        layer for index, layer in enumerate(layers) if first <= model_chunk.first_layer + index < end
    )
    return FP8_COPY_BYTES * sum(
        size
        for name, size in parameters
        if name.startswith(kept) and ".linear_" in name and name.endswith(".weight")
    )


@dataclass(frozen=True, kw_only=True)
class TrainedNumbers:
    """Trained numbers of a rank, and those whose gradients are summed over tp at the end of a step."""

    all: int
    summed_over_tp: int
    experts: int = 0


@lru_cache(maxsize=512)
def trained_numbers(
    arch: InternVLArchitecture,
    plan: ParallelPlan,
    model_chunks: tuple[ModelChunk, ...],
    frozen: frozenset[str],
    lora: LoRAConfig,
) -> TrainedNumbers:
    """Count a pipeline rank's trained numbers.

    With sequence parallelism mcore sums over tp, in one float32 copy, the gradients of the norms, and of the whole
    tower and projector where they are replicated and encode different tiles.

    Args:
        arch: the model.
        plan: sizes of the axes.
        model_chunks: of the rank.
        frozen: see `frozen_parts`.
        lora: adapters.
    """
    trained = [
        (name, size)
        for model_chunk in model_chunks
        for name, size in model_chunk_parameters(arch, plan, model_chunk, lora)
        if is_trained_name(name, frozen)
    ]
    sums = plan.tp > 1 and plan.sequence_parallel
    return TrainedNumbers(
        all=sum(size for _, size in trained),
        experts=sum(size for name, size in trained if is_expert(name)),
        summed_over_tp=sum(size for name, size in trained if _is_summed(name, plan)) if sums else 0,
    )


def _is_summed(parameter: str, plan: ParallelPlan) -> bool:
    if parameter.startswith("language."):
        return "layernorm" in parameter or parameter.endswith("router.weight")
    return plan.vision == "replicated"
