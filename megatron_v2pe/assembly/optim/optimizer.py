"""Data parallelism, optimizer and learning rate schedule around a built model.

model chunks -> Float16Module (bf16) -> DistributedDataParallel -> DistributedOptimizer(Adam) -> cosine schedule
                                     groups of parameters: `param_groups`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.optim.expert_bias import ExpertBias
from megatron_v2pe.assembly.optim.fused_adam import install_fused_adam
from megatron_v2pe.assembly.optim.grad_norms import PartShards, counted_shards, trained_optimizers
from megatron_v2pe.assembly.optim.param_groups import group_overrides
from megatron_v2pe.config.schema import OptimConfig, RunConfig
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.runtime.shard_exchange import gather_shards, sum_shards


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What an optimizer step needs.

    Attributes:
        model_chunks: bare model chunks, for checkpoints and logits.
        wrapped: the same model chunks under data parallelism, for the schedule.
        optimizer: mcore's distributed optimizer.
        scheduler: learning rate and weight decay by step.
        expert_bias: of the routers; without a value where nothing balances experts by a bias.
    """

    model_chunks: list[InternVL]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    expert_bias: ExpertBias

    @cached_property
    def shards(self) -> PartShards:
        """What this rank updates, by part."""
        return counted_shards(self.optimizer, self.model_chunks)


def wrap_for_training(model_chunks: list[InternVL], config: RunConfig) -> Trainer:
    """Wrap model chunks whose weights are loaded; master weights are copied from them here."""
    install_fused_adam()  # in place of torch's Adam, which cannot resume under mcore
    return build_trainer(model_chunks, wrap_data_parallel(model_chunks, config, shard_gradients=True), config)


def build_trainer(
    model_chunks: list[InternVL], wrapped: list[DistributedDataParallel], config: RunConfig
) -> Trainer:
    """Optimizer and schedule around model chunks under data parallelism; call `install_fused_adam` before."""
    optimizer = build_optimizer(wrapped, config)
    for model_chunk in model_chunks:
        model_chunk.config.grad_scale_func = optimizer.scale_loss
    return Trainer(
        model_chunks=model_chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.optim),
        expert_bias=ExpertBias(model_chunks, rate=config.moe.bias_rate),
    )


def wrap_data_parallel(
    model_chunks: list[InternVL], config: RunConfig, *, shard_gradients: bool
) -> list[DistributedDataParallel]:
    """Gradient buffers in float32 (in float64 those of a float64 model), summed over data and context parallel ranks.

    Args:
        model_chunks: bare model chunks.
        config: the run.
        shard_gradients: leave each rank its shard of the sum, for the distributed optimizer; otherwise every
            rank ends with whole gradients.
    """
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.runtime.dtype != "float64",  # which only comparisons have
        use_distributed_optimizer=shard_gradients,
        overlap_grad_reduce=parallel.overlap_grad_reduce and shard_gradients,
        overlap_param_gather=parallel.overlap_param_gather and shard_gradients,
    )
    wrapped = []
    for index, model_chunk in enumerate(model_chunks):
        module = (
            Float16Module(model_chunk.config, model_chunk)
            if config.runtime.dtype == "bfloat16"
            else model_chunk
        )
        wrapper = DistributedDataParallel(model_chunk.config, ddp_config, module, disable_bucketing=index > 0)
        wrapper.vp_stage = model_chunk.vp_stage  # the interleaved schedule reads it from the wrapper
        if ddp_config.overlap_grad_reduce:
            model_chunk.config.no_sync_func = wrapper.no_sync  # micro batches before the last only add
        elif shard_gradients:
            _exchange_nothing_alone(wrapper)
            _exchange_directly(wrapper)
        if ddp_config.overlap_param_gather:
            _gather_head_in_time(wrapper, model_chunk)
        wrapped.append(wrapper)
    return wrapped


def _gather_head_in_time(wrapper: DistributedDataParallel, model_chunk: InternVL) -> None:
    """Wait for the head's weights before the final norm.

    mcore waits for a module's weights when the module is called; the head's are used without (`LanguageModel.loss`).
    """
    language = model_chunk.language
    if language.post_process:
        is_tied = language.share_embeddings_and_output_weights and language.pre_process
        owner = language.embedding.word_embeddings if is_tied else language.output_layer
        wait = wrapper._make_forward_pre_hook()
        language.decoder.final_layernorm.register_forward_pre_hook(lambda *_: wait(owner))


def _exchange_directly(wrapper: DistributedDataParallel) -> None:
    """Sum and gather buffers in host memory by `shard_exchange`."""
    for bucket_group in (*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups):
        group = bucket_group.intra_distributed_optimizer_instance_group
        on_host = all(bucket.grad_data.device.type == "cpu" for bucket in bucket_group.buckets)
        # Sums are divided once by the global weight (`calculate_per_token_loss`), so mcore scales nothing here.
        if on_host and group.size() > 1 and _scales_nothing(bucket_group):
            gradients = [bucket.grad_data for bucket in bucket_group.buckets]
            weights = [bucket.param_data for bucket in bucket_group.buckets]
            bucket_group.start_grad_sync = partial(_on_each, sum_shards, gradients, group)
            bucket_group.start_param_sync = partial(_on_each, gather_shards, weights, group)


def _on_each(
    exchange: Callable[[Tensor, dist.ProcessGroup], None],
    buffers: list[Tensor],
    group: dist.ProcessGroup,
    *_args: Any,
    **_kwargs: Any,
) -> None:
    for buffer in buffers:
        exchange(buffer, group)


def _scales_nothing(bucket_group: Any) -> bool:
    return all(bucket.gradient_scaling_factor == 1.0 for bucket in bucket_group.buckets)


def _exchange_nothing_alone(wrapper: DistributedDataParallel) -> None:
    """Leave out the reduction and the gathering of buffers that one rank holds whole.

    mcore runs both collectives over groups of one as well: each copies every gradient and every weight onto itself.
    """
    for bucket_group in (*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups):
        is_alone = bucket_group.intra_distributed_optimizer_instance_size == 1
        if is_alone and _scales_nothing(bucket_group):
            bucket_group.start_grad_sync = _nothing
            bucket_group.start_param_sync = _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


def build_optimizer(wrapped: list[Any], config: RunConfig) -> MegatronOptimizer:
    """Adam, its state sharded over data and context parallel ranks."""
    optim = config.optim
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.runtime.dtype == "bfloat16",
        params_dtype=DTYPES[config.runtime.dtype],
        use_distributed_optimizer=True,
    )
    # `init_distributed` makes no extra gloo groups; only the `mem_efficient` way of gathering state needs them.
    optimizer = get_megatron_optimizer(
        optimizer_config,
        wrapped,
        config_overrides=group_overrides(wrapped, optim),
        use_gloo_process_groups=False,
    )
    for single in trained_optimizers(optimizer):
        if _updates_weights_in_place(single):  # mcore would copy each onto itself
            single._copy_main_params_to_model_params = _nothing
    return optimizer


def _updates_weights_in_place(optimizer: Any) -> bool:
    """Whether all slices that Adam updates are parts of the float32 weights themselves."""
    pairs = zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True)
    return not any(map(len, optimizer.model_float16_groups)) and all(
        weight.untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
        for weights, shards in pairs
        for weight, shard in zip(weights, shards, strict=True)
    )


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Prepare an optimizer to be saved. Collective.

    Makes zero moments where no update has been applied yet; mcore cannot save an optimizer without them. Sets the
    number of updates in every group: mcore stores rank 0's groups for all, and a rank that trains nothing counts none.
    """
    groups = optimizer.param_groups
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        steps, max((group.get("step", 0) for group in groups if group["params"]), default=0)
    )
    for group in groups:
        group["step"] = max(steps)
    for single in trained_optimizers(optimizer):
        single.init_state_fn(single.optimizer, single.config)


def build_scheduler(optimizer: MegatronOptimizer, optim: OptimConfig) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then a cosine to min_lr at the last step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=optim.steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=optim.steps,
        wd_incr_style="constant",
        # A resumed run keeps its own numbers: optim.steps may grow between runs.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
