"""Recorded towers through `PyramidTower`, the class that trains, built by the code that builds it for training.

config of the case --architecture--> build_vision --weights by the tables of import--> hidden states
gradients of ours --the same tables--> the release's names
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.build import build_vision
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.checkpoint.hf.name_map import Entry, vision_entries
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.env import launcher
from megatron_v2pe.models.piip.tower import PyramidTower
from megatron_v2pe.models.vision import InternViT
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed, resolve
from megatron_v2pe.verification.golden.pyramid.cases import PyramidCase, Run, leaves
from megatron_v2pe.verification.golden.pyramid.models import settings_of

# The release's names of an InternViT -> Hugging Face InternVL2's.
_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".ls1.gamma": ".ls1",
    ".ls2.gamma": ".ls2",
}


def run_tower(case: PyramidCase, dtype: torch.dtype) -> Run:
    """A case of a whole tower on one rank."""
    plan = resolve(ParallelConfig(), launcher().world_size)
    context = init_distributed(plan, seed=0)
    arch = tower_architecture(case.config)
    tower = _build(arch, context, dtype, returns_all=not case.config.get("loss_on_first", False))
    weights = case.part("weight", dtype)
    entries = vision_entries(arch, returns_all=tower.returns_all)
    to_hf = {_hf_name(name): name for name in weights}
    _fill(tower, entries, {name: weights[own] for name, own in to_hf.items()})
    inputs = leaves(case.part("input", dtype))
    tiles = [inputs[f"pixels{branch + 1}"] for branch in range(len(inputs))]
    inter: dict[str, Tensor] = {}
    hidden: list[Tensor] = []
    for index, hidden in enumerate(tower.states(tiles)):
        name = f"after_{index - 1}/hidden" if index else "embedded"
        inter |= {f"{name}{branch + 1}": state for branch, state in enumerate(hidden)}
    outputs = {f"hidden{branch + 1}": state for branch, state in enumerate(hidden)}
    with torch.no_grad():
        inter["branch1_alone"] = InternViT.forward(tower, tiles[0])
    return Run(
        outputs=outputs,
        inter=inter,
        parameters={},
        inputs=inputs,
        gradients=lambda: _gradients(tower, entries, to_hf),
    )


def tower_architecture(config: Mapping[str, Any]) -> InternVLArchitecture:
    """Architecture of a recorded tower, read by the code that reads config.json; its language model is a dummy."""
    large, *smaller = (_internvit(values) for values in config["branches"])
    settings = settings_of(config["interaction"])
    values = dict(PUBLISHED["2B"])
    values["vision_config"] = {**values["vision_config"], **large}
    values["force_image_size"] = large["image_size"]
    values["piip_config"] = {
        "branches": smaller,
        "interactions": len(config["indexes"][0]),
        "deform_num_heads": settings.heads,
        "n_points": settings.points,
        "deform_ratio": settings.value_ratio,
        "cffn_ratio": settings.ffn_ratio,
        "interact_attn_type": settings.attention,
        "norm_layer": "ln" if settings.norm else "none",
        "interaction_proj": settings.projection,
    }
    return parse_architecture(values)


def _internvit(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": values["embed_dim"],
        "num_hidden_layers": values["depth"],
        "num_attention_heads": values["num_heads"],
        "intermediate_size": int(values["embed_dim"] * values["mlp_ratio"]),
        "image_size": values["img_size"],
        "patch_size": values["patch_size"],
        "norm_type": "rms_norm" if values["norm_layer_type"] == "RMSNorm" else "layer_norm",
        "qkv_bias": values["qkv_bias"],
        "qk_normalization": values["qk_normalization"],
    }


def _build(
    arch: InternVLArchitecture, context: ParallelContext, dtype: torch.dtype, *, returns_all: bool
) -> PyramidTower:
    name: Any = str(dtype).removeprefix("torch.")
    config = RunConfig(runtime=RuntimeConfig(dtype=name))
    modules = choose_modules(ParallelConfig(attention_backend="native"), dtype="float32")
    tower = build_vision(
        config, arch, modules, choose_elementwise(config.runtime), context, returns_all=returns_all
    )
    return cast(PyramidTower, tower.to(context.ranks.device).eval())


def _hf_name(name: str) -> str:
    """`branch1.blocks.0.norm1.weight` to the name that import-hf knows."""
    if name.startswith("interactions."):
        return f"vision_model.piip.{name}"
    branch, _, rest = name.partition(".")
    for release, ours in _NAMES.items():
        rest = rest.replace(release, ours)
    number = int(branch.removeprefix("branch"))
    return f"vision_model.{rest}" if number == 1 else f"vision_model.piip.branches.{number - 2}.{rest}"


def _fill(tower: PyramidTower, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> None:
    """Load tensors of Hugging Face's names; the last interaction may have ways that this tower never builds."""
    state = {
        name.removeprefix("vision."): entry.transform.to_ours([tensors[part] for part in entry.hf])
        for name, entry in entries.items()
    }
    own = dict(tower.named_parameters())
    if set(own) != set(state) & set(own):
        raise RuntimeError(f"parameters without a recorded weight: {sorted(set(own) - set(state))}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name].reshape(parameter.shape))


def _gradients(
    tower: PyramidTower, entries: Mapping[str, Entry], to_hf: Mapping[str, str]
) -> dict[str, Tensor | None]:
    """Gradients by the release's names; None for what was not built or takes no part."""
    own = dict(tower.named_parameters())
    found: dict[str, Tensor | None] = dict.fromkeys(to_hf.values())
    for name, entry in entries.items():
        parameter = own.get(name.removeprefix("vision."))
        if parameter is not None and parameter.grad is not None:
            for hf_name, gradient in zip(entry.hf, entry.to_hf(parameter.grad.cpu()), strict=True):
                found[to_hf[hf_name]] = gradient
    return found
