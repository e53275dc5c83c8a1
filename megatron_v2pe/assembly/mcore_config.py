"""From a checkpoint's architecture and a run's plan to mcore's `TransformerConfig`, one for each part.

This file and `models/layers/layer_specs.py` are where mcore's configuration is touched. Fields that are set for a
reason other than the model itself carry that reason.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_v2pe.assembly.compiled import fuses_swiglu
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.rope_scaling import RopeScaling
from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.v2pe.rope import RopeSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _common(config: RunConfig) -> dict[str, Any]:
    dtype = DTYPES[config.runtime.dtype]
    return dict(
        deterministic_mode=config.runtime.deterministic,
        # Weights always come from a checkpoint; mcore only has to allocate them.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # mcore's fused GELU is the tanh approximation, the tower's and the projector's is exact (see `elementwise`).
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        # Gradients are summed over data and context parallel ranks and divided once, by the global weight.
        calculate_per_token_loss=True,
    )


def _recompute(kind: str) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "selective":  # the MLP, which `RecomputingLayer` does itself
        return dict(recompute_granularity="selective", recompute_modules=[])
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _pipeline(parallel: ParallelConfig) -> dict[str, Any]:
    # Waiting for the GPU after every exchange protects from a fault of batched sends that torch had before 2.6.
    fields: dict[str, Any] = {"batch_p2p_sync": False}
    if parallel.pipeline_layout:
        fields["pipeline_model_parallel_layout"] = parallel.pipeline_layout
    if parallel.vpp > 1:
        # With two pipeline ranks the next one is also the previous one, and with batched sends mcore matches a
        # send to the wrong receive; with variable lengths and four ranks it deadlocks.
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
        if not parallel.pipeline_layout:  # a layout implies it
            fields["virtual_pipeline_model_parallel_size"] = parallel.vpp
    return fields


def _experts(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan) -> dict[str, Any]:
    """Fields of a mixture of experts; routing and its losses are `models.experts.ExpertRouter`'s own."""
    experts = arch.language.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.num_experts,
        moe_router_topk=experts.top_k,
        moe_ffn_hidden_size=experts.ffn_size,
        moe_layer_freq=[int(sparse) for sparse in experts.is_sparse],
        moe_router_load_balancing_type="none",
        moe_expert_capacity_factor=config.moe.capacity_factor or None,  # the dispatcher counts what is left
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
    )


def _attention_kind(arch: InternVLArchitecture) -> dict[str, Any]:
    """Fields of windows and sinks, which the attention core reads; a window includes the token itself here."""
    language = arch.language
    fields: dict[str, Any] = {"softmax_type": "learnable"} if language.sinks else {}
    if language.window:
        fields["window_size"] = (language.window - 1, 0)
        fields["window_attn_skip_freq"] = [int(windowed) for windowed in language.is_windowed]
    return fields


def _fp8(model: ModelConfig) -> dict[str, Any]:
    """FP8 linears under the names of mcore; gradients have the wider exponent where a tensor has one scale."""
    if model.fp8 == "none":
        return {}
    recipe = dict(current=("hybrid", "tensorwise"), blockwise=("e4m3", "blockwise"))[model.fp8]
    return dict(
        fp8=recipe[0],
        fp8_recipe=recipe[1],
        first_last_layers_bf16=model.fp8_skip_layers > 0,
        num_layers_at_start_in_bf16=model.fp8_skip_layers,
        num_layers_at_end_in_bf16=model.fp8_skip_layers,
    )


def language_config(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan) -> TransformerConfig:
    """mcore's configuration of the decoder."""
    language = arch.language
    common = {**_common(config), "bias_activation_fusion": fuses_swiglu(config.model)}
    return TransformerConfig(
        **common,
        **_recompute(config.model.recompute),
        **_pipeline(config.parallel),
        **_experts(config, arch, plan),
        **_attention_kind(arch),
        **_fp8(config.model),
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=language.head_dim,
        ffn_hidden_size=language.ffn_size,
        layernorm_epsilon=language.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        context_parallel_size=plan.cp,
        sequence_parallel=plan.sequence_parallel,
        cp_comm_type=config.parallel.cp_comm_type,
        # Packs differ in length between micro batches. mcore ties this to a MoE setting even for dense models.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )


def vision_config(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan) -> TransformerConfig:
    """mcore's configuration of the vision tower.

    A split tower has its heads padded to a multiple of tp (InternViT-6B has 25); it never uses sequence
    parallelism, because the 1025 tokens of a tile do not split.
    """
    vision, tp = arch.vision, plan.tower_tp
    return TransformerConfig(
        **_common(config),
        **_recompute(config.vision.recompute),
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=-(-vision.num_heads // tp) * tp,
        kv_channels=vision.hidden_size // vision.num_heads,
        tensor_model_parallel_size=tp,
        ffn_hidden_size=vision.ffn_size,
        layernorm_epsilon=vision.norm_eps,
        normalization="LayerNorm" if vision.norm_type == "layer_norm" else "RMSNorm",
        activation_func=F.gelu,
        add_bias_linear=True,
        add_qkv_bias=vision.qkv_bias,
    )


def projector_config(config: RunConfig, arch: InternVLArchitecture, plan: ParallelPlan) -> TransformerConfig:
    """mcore's configuration of the projector; its norm is a LayerNorm whatever the tower's is."""
    hidden = arch.language.hidden_size
    return TransformerConfig(
        **_common(config),
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=arch.language.num_heads,
        tensor_model_parallel_size=plan.tower_tp,
        ffn_hidden_size=hidden,
        layernorm_epsilon=1e-5,
        normalization="LayerNorm",
        activation_func=F.gelu,
        add_bias_linear=True,
    )


def rope_spec(config: RunConfig, arch: InternVLArchitecture) -> RopeSpec:
    """Rotary embedding of the run: V2PE replaces linear and dynamic scaling, as in the release."""
    language = arch.language
    is_v2pe = config.position.mode != "default" or arch.position_mode != "default"
    is_scaled = language.rope_scaling.is_trained_in or not is_v2pe
    return RopeSpec(
        dim=language.head_dim,
        base=language.rope_theta,
        scaling=language.rope_scaling if is_scaled else RopeScaling(),
        tokens_per_tile=arch.tokens_per_tile,
        precision=config.position.rope_precision,
        fractional=is_v2pe,
    )
