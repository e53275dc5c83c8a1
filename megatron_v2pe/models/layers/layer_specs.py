"""Which module fills which role of a transformer layer: Transformer Engine's, or mcore's local ones.

Both name their parameters alike (separate norms, no norm fused into a linear), so checkpoints of the two are the
same. The attention core is an argument: it belongs to the parallel plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_v2pe.models.layers.clamped_experts import ClampedExperts
from megatron_v2pe.models.layers.experts import SequentialExperts
from megatron_v2pe.models.layers.linears import ColumnLinear, RowLinear
from megatron_v2pe.models.layers.norms import Norm


@dataclass(frozen=True, kw_only=True)
class BackendModules:
    """Modules of one back end.

    Attributes:
        norm: normalisation of the layers and of the final norm.
        linear_qkv: queries, keys and values; splits its output over tp, as linear_fc1 does.
        linear_proj: output of attention; splits its input over tp, as linear_fc2 does.
        linear_fc1: first linear of an MLP.
        linear_fc2: second linear of an MLP.
        expert_fc1: first linear of an expert, which carries no adapters.
        expert_fc2: second linear of an expert.
        language_attention: attention core of the decoder (causal, packed, context parallel, rotary inside).
        vision_attention: attention core of the vision tower (bidirectional).
        experts: spec of the experts of a layer, where they are no MLPs of the two linears above.
    """

    norm: Any
    linear_qkv: Any
    linear_proj: Any
    linear_fc1: Any
    linear_fc2: Any
    expert_fc1: Any
    expert_fc2: Any
    language_attention: Any
    vision_attention: Any
    experts: ModuleSpec | None = None


def local_modules(*, language_attention: Any, vision_attention: Any) -> BackendModules:
    """mcore's linears on torch's products and our norms; CPU, and GPUs without Transformer Engine."""
    return BackendModules(
        norm=Norm,
        linear_qkv=ColumnLinear,
        linear_proj=RowLinear,
        linear_fc1=ColumnLinear,
        linear_fc2=RowLinear,
        expert_fc1=ColumnLinear,
        expert_fc2=RowLinear,
        language_attention=language_attention,
        vision_attention=vision_attention,
    )


def transformer_engine_modules(*, language_attention: Any, vision_attention: Any) -> BackendModules:
    """Transformer Engine's linears and norms through mcore; needs CUDA and the extra `gpu`."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return BackendModules(
        norm=TENorm,
        linear_qkv=TEColumnParallelLinear,
        linear_proj=TERowParallelLinear,
        linear_fc1=TEColumnParallelLinear,
        linear_fc2=TERowParallelLinear,
        expert_fc1=TEColumnParallelLinear,
        expert_fc2=TERowParallelLinear,
        language_attention=language_attention,
        vision_attention=vision_attention,
    )


def with_clamped_experts(modules: BackendModules, *, ffn_size: int, limit: float) -> BackendModules:
    """The modules with experts of GPT-OSS; they are ours in every back end."""
    experts = ModuleSpec(module=ClampedExperts, params={"ffn_size": ffn_size, "limit": limit})
    return replace(modules, experts=experts)


def with_proj_bias(modules: BackendModules) -> BackendModules:
    """The modules with a bias of the output projection of attention.

    mcore's own switch for it also gives biases to experts, and then refuses to split those.
    """
    return replace(modules, linear_proj=_with(modules.linear_proj, bias=True))


def _with(linear: Any, **fixed: Any) -> Any:
    """The linear class with arguments that its caller does not decide."""

    class Fixed(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, **fixed})

    return Fixed


def _without_bias(linear: Any) -> Any:
    """The linear class with its bias switched off.

    mcore gives queries, keys and values a bias whenever the other linears have one; InternViT-6B does not.
    """
    return _with(linear, bias=False)


def _attention(
    modules: BackendModules,
    *,
    core: Any,
    mask: AttnMaskType,
    module: type,
    linear_qkv: Any = None,
    head_norm: Any = None,
    **params: Any,
) -> ModuleSpec:
    return ModuleSpec(
        module=module,
        params={"attn_mask_type": mask, **params},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv or modules.linear_qkv,
            core_attention=core,
            linear_proj=modules.linear_proj,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def mlp_submodules(modules: BackendModules) -> MLPSubmodules:
    """Linears of an MLP."""
    return MLPSubmodules(linear_fc1=modules.linear_fc1, linear_fc2=modules.linear_fc2)


def _mlp(modules: BackendModules) -> ModuleSpec:
    # The exact class MLP: mcore hands its tp group to no other (transformer_layer.py, "Module 8").
    return ModuleSpec(module=MLP, submodules=mlp_submodules(modules))


def _mixture_of_experts(modules: BackendModules, router: Any) -> ModuleSpec:
    """A router and experts in the place of an MLP; the exact class MoELayer, as above."""
    linears = MLPSubmodules(linear_fc1=modules.expert_fc1, linear_fc2=modules.expert_fc2)
    experts = modules.experts or ModuleSpec(module=SequentialExperts, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=router))


def _layer(
    modules: BackendModules, *, module: type, attention: ModuleSpec, mlp: ModuleSpec, params: dict[str, Any]
) -> ModuleSpec:
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=modules.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=modules.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def language_layer_spec(
    modules: BackendModules, *, layer: type, qk_norm: bool = False, router: Any = None, **params: Any
) -> ModuleSpec:
    """Pre-norm decoder layer of class `layer`, built with `params`.

    Args:
        modules: modules of the back end.
        layer: class of the layer.
        qk_norm: queries and keys of each head are normalised before the rotation.
        router: builds the router of a layer with experts; None gives it one MLP.
        **params: keyword arguments of `layer`.
    """
    attention = _attention(
        modules,
        core=modules.language_attention,
        mask=AttnMaskType.causal,
        module=SelfAttention,
        head_norm=modules.norm if qk_norm else None,
    )
    mlp = _mlp(modules) if router is None else _mixture_of_experts(modules, router)
    return _layer(modules, module=layer, attention=attention, mlp=mlp, params=params)


def vision_layer_spec(
    modules: BackendModules, *, layer: type, attention: type, qkv_bias: bool, qk_norm: Any, **params: Any
) -> ModuleSpec:
    """Pre-norm bidirectional layer.

    Args:
        modules: modules of the back end.
        layer: class of the layer, built with `params` (InternViT adds LayerScale and drop path).
        attention: class of the attention, built with `qk_norm`.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: what normalises queries and keys, or None.
        **params: keyword arguments of `layer`.
    """
    spec = _attention(
        modules,
        core=modules.vision_attention,
        mask=AttnMaskType.no_mask,
        module=attention,
        linear_qkv=modules.linear_qkv if qkv_bias else _without_bias(modules.linear_qkv),
        qk_norm=qk_norm,
    )
    return _layer(modules, module=layer, attention=spec, mlp=_mlp(modules), params=params)
