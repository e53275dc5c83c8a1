"""Recorded modules and image models of the PIIP release, run with this package's interactions and readout.

classification, detection, llava:  pixels --resize--> branches --intervals, Interaction--> merge or projector
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from megatron_v2pe.models.piip.attention import DeformableAttention
from megatron_v2pe.models.piip.geometry import (
    Grid,
    map_to_tokens,
    reference_points,
    resize_map,
    resize_pixels,
    tokens_to_map,
)
from megatron_v2pe.models.piip.interaction import (
    Injector,
    Interaction,
    InteractionSettings,
    InteractionUnit,
)
from megatron_v2pe.models.piip.readout import PyramidProjector
from megatron_v2pe.verification.golden.pyramid.blocks import Branch, Class, embed, run_block
from megatron_v2pe.verification.golden.pyramid.cases import PyramidCase, Run, leaves

Weights = Mapping[str, Tensor]
GROUPS = 32
GATES = {"ca_weight": "ca_gamma", "cffn_weight": "cffn_gamma"}  # LLaVA's names


def settings_of(args: Mapping[str, Any]) -> InteractionSettings:
    """Our settings from the arguments of any of the release's classes."""
    kind = args.get("attn_type", args.get("interact_attn_type", "deform"))
    return InteractionSettings(
        heads=args.get("deform_num_heads", args.get("num_heads", 16)),
        points=args.get("n_points", 4),
        value_ratio=args.get("deform_ratio", args.get("ratio", 1.0)),
        ffn_ratio=args.get("cffn_ratio", 0.25),
        attention="dense" if kind == "normal" else "deformable",
        norm=args.get("norm", args.get("norm_layer", "ln")) != "none",
        projection=args.get("with_proj", args.get("interaction_proj", True)),
        drop_path=args.get("drop_path", args.get("interaction_drop_path_rate", 0.0)),
    )


def run_module(case: PyramidCase, dtype: torch.dtype) -> Run:
    """A case of one module: attention, injector or unit."""
    weights, inputs = leaves(case.part("weight", dtype)), leaves(case.part("input", dtype))
    config, settings = case.config, settings_of(case.config["args"])
    args = config["args"]
    if "grid1" in config:
        widths = (args["branch1_dim"], args["branch2_dim"])
        unit = InteractionUnit(widths, settings, dtype=dtype).eval()
        grids = (tuple(config["grid1"]), tuple(config["grid2"]))
        x1, x2 = functional_call(unit, weights, (inputs["x1"], inputs["x2"]), {"grids": grids})
        return Run(outputs={"x1": x1, "x2": x2}, inter={}, parameters=weights, inputs=inputs)
    grids = (tuple(config["query_grid"]), tuple(config["feat_grid"]))
    pair = (inputs["query"], inputs["feat"])
    inter: dict[str, Tensor] = {}
    if "d_model" in args:
        attention = _attention_module(args, dtype)
        names = {"query_grid": grids[0], "value_grid": grids[1]}
        out = functional_call(attention, weights, pair, names)
        inter = _sampling(attention, weights, pair, grids)
    else:
        injector = Injector(args["dim"], args["dim_feat"], settings, dtype).eval()
        out = functional_call(injector, weights, pair, {"grid": grids[0], "feat_grid": grids[1]})
    return Run(outputs={"out": out}, inter=inter, parameters=weights, inputs=inputs)


def _attention_module(args: Mapping[str, Any], dtype: torch.dtype) -> DeformableAttention:
    return DeformableAttention(
        args["d_model"],
        args["d_feat"],
        heads=args["n_heads"],
        points=args["n_points"],
        ratio=args["ratio"],
        dtype=dtype,
    )


def _sampling(
    attention: DeformableAttention, weights: Weights, pair: tuple[Tensor, Tensor], grids: tuple[Grid, Grid]
) -> dict[str, Tensor]:
    """What the module reads and where, with the release's level axis."""
    attention.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    with torch.no_grad():
        read = attention.sampling(*pair, query_grid=grids[0], value_grid=grids[1])
    points = reference_points(grids[0], dtype=read.locations.dtype)
    return {
        "value": read.value,
        "sampling_locations": read.locations.unsqueeze(3),
        "attention_weights": read.weights.unsqueeze(3),
        "reference_points": points[None, :, None],
    }


def branches_of(args: Mapping[str, Any], prefix: str) -> list[Branch]:
    """Branches of a recorded image model, largest network first."""
    names = sorted(name for name in args if name.startswith("branch"))
    return [_branch(args[name], f"{prefix}{name}.") for name in names]


def _branch(values: Mapping[str, Any], prefix: str) -> Branch:
    clip = values.get("clip")
    stops = tuple(last + 1 for _, last in values["interaction_indexes"])
    depth = clip["num_hidden_layers"] if clip else values["depth"]
    windows = values.get("window_attn", [False] * depth)
    side = values.get("window_size", [0] * depth)
    return Branch(
        prefix=prefix,
        kind="clip" if clip else _kind(values),
        size=values.get("real_size") or values["img_size"],
        patch=values["patch_size"],
        depth=depth,
        heads=clip["num_attention_heads"] if clip else values["num_heads"],
        class_token=_class_token(values),
        windows=tuple(side[layer] if windows[layer] else 0 for layer in range(depth)),
        stops=stops,
    )


def _kind(values: Mapping[str, Any]) -> Any:
    name = values.get("model_type", values.get("pretrained"))
    return "deit" if name == "deit" else "intern"


def _class_token(values: Mapping[str, Any]) -> Class:
    """Only CLIP adds the class token's own position; detection has no class token."""
    if not values.get("use_cls_token", False):
        return "none"
    return "with_position" if "clip" in values else "without_position"


def run_branches(
    branches: list[Branch],
    interactions: list[Interaction],
    weights: Weights,
    pixels: Tensor,
    *,
    prefix: str,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Pixels at the largest size to the maps [n, C_b, h_b, w_b] of all branches, and what is on the way."""
    largest = max(branch.size for branch in branches)
    sizes = [tuple(side * branch.size // largest for side in pixels.shape[-2:]) for branch in branches]
    embedded = [
        embed(weights, branch, resize_pixels(pixels, (size[0], size[1])))
        for branch, size in zip(branches, sizes, strict=True)
    ]
    states, grids = [x for x, _ in embedded], [grid for _, grid in embedded]
    num_class = [0 if branch.class_token == "none" else 1 for branch in branches]
    inter: dict[str, Tensor] = {}
    for index, interaction in enumerate(interactions):
        for number, branch in enumerate(branches):
            start = branch.stops[index - 1] if index else 0
            for layer in range(start, branch.stops[index]):
                states[number] = run_block(weights, branch, layer, states[number], grids[number])
        own = f"{prefix}interactions.{index}."
        patches = [state[:, count:] for state, count in zip(states, num_class, strict=True)]
        parameters = _below(weights, own)
        mixed = functional_call(interaction, parameters, (patches, grids))
        classes = [state[:, :count] for state, count in zip(states, num_class, strict=True)]
        states = [torch.cat(pair, dim=1) for pair in zip(classes, mixed, strict=True)]
        inter |= {f"after_{index}/x{b + 1}": x for b, x in enumerate(mixed)}
        inter |= {f"after_{index}/cls{b + 1}": x for b, x in enumerate(classes) if x.shape[1]}
    maps = [
        tokens_to_map(state[:, count:], grid)
        for state, count, grid in zip(states, num_class, grids, strict=True)
    ]
    return maps, inter


def _below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Weights below a prefix under our names; LLaVA names its gates otherwise."""
    found = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    ends = {name: name.rpartition(".") for name in found}
    return {f"{head}{dot}{GATES.get(last, last)}": found[name] for name, (head, dot, last) in ends.items()}


def make_interactions(weights: Weights, branches: list[Branch], args: Mapping[str, Any]) -> list[Interaction]:
    """Interactions of a recorded model; their weights are given at each call."""
    widths = tuple(_width(weights, branch) for branch in branches)
    settings, dtype = settings_of(args), next(iter(weights.values())).dtype
    return [Interaction(widths, settings, dtype=dtype).eval() for _ in branches[0].stops]


def _width(weights: Weights, branch: Branch) -> int:
    name = (
        "clip_model.embeddings.patch_embedding.weight" if branch.kind == "clip" else "patch_embed.proj.weight"
    )
    return weights[f"{branch.prefix}{name}"].shape[0]


def run_image_model(case: PyramidCase, dtype: torch.dtype) -> Run:
    """A case of classification, detection or LLaVA."""
    weights, inputs = leaves(case.part("weight", dtype)), leaves(case.part("input", dtype))
    prefix = "tower." if case.file == "llava" else ""
    args = case.config["args"]
    branches = branches_of(args, prefix)
    interactions = make_interactions(weights, branches, args)
    maps, inter = run_branches(branches, interactions, weights, inputs["pixels"], prefix=prefix)
    if case.file == "classification" and args.get("separate_head"):
        outputs = {"out": _separate_heads(weights, branches, maps)}
    elif case.file == "classification":
        outputs, merged = _classified(weights, maps)
        inter["merged"] = merged
    elif case.file == "detection":
        outputs = {"merged": _merged_maps(weights, maps)}
    else:
        outputs = {f"x{b + 1}": image for b, image in enumerate(maps)}
        config = case.config["projector"]
        outputs["tokens"] = _projected(_below(weights, "mm_projector."), config, maps)
    return Run(outputs=outputs, inter=inter, parameters=weights, inputs=inputs)


def run_projector(case: PyramidCase, dtype: torch.dtype) -> Run:
    """A case of LLaVA's projector alone."""
    weights, inputs = leaves(case.part("weight", dtype)), leaves(case.part("input", dtype))
    tokens = _projected(weights, case.config, [inputs["x1"], inputs["x2"]])
    return Run(outputs={"tokens": tokens}, inter={}, parameters=weights, inputs=inputs)


def _projected(weights: Weights, config: Mapping[str, Any], maps: list[Tensor]) -> Tensor:
    values = config["config"]
    side = values.get("out_shape")
    projector = PyramidProjector(
        tuple(image.shape[1] for image in maps),
        config["out_dim"],
        norm="group" if values["norm"] == "gn" else "layer",
        out_grid=(side, side) if side else None,
        dtype=maps[0].dtype,
    )
    return functional_call(projector, dict(weights), (maps,))


def _separate_heads(weights: Weights, branches: list[Branch], maps: list[Tensor]) -> Tensor:
    """Mean of one head per branch, which read the first patch, as released."""
    scores = []
    for branch, image in zip(branches, maps, strict=True):
        p = branch.prefix
        first = map_to_tokens(image)[:, 0]
        width = first.shape[-1:]
        x = F.layer_norm(first, width, weights[f"{p}norm.weight"], weights[f"{p}norm.bias"], 1e-6)
        scores.append(F.linear(x, weights[f"{p}head.weight"], weights[f"{p}head.bias"]))
    return torch.stack(scores).mean(0)


def _group_norm(weights: Weights, name: str, image: Tensor) -> Tensor:
    return F.group_norm(image, GROUPS, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _classified(weights: Weights, maps: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Class scores, and the merged tokens [n, h*w, C_1]."""
    total: Tensor | float = 0.0
    grid = (maps[-1].shape[-2], maps[-1].shape[-1])
    for index, image in enumerate(maps):
        name = f"merge_branch{index + 1}"
        if index == 0:
            x = _group_norm(weights, name, image)
        else:
            x = _group_norm(weights, f"{name}.0", image)
            tokens = F.linear(map_to_tokens(x), weights[f"{name}.2.weight"], weights[f"{name}.2.bias"])
            x = _group_norm(weights, f"{name}.4", tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:]))
        total = total + weights[f"w{index + 1}"] * resize_map(x, grid)
    assert isinstance(total, Tensor)
    merged = map_to_tokens(total)
    width = merged.shape[-1:]
    x = F.layer_norm(merged, width, weights["cls_norm.weight"], weights["cls_norm.bias"], 1e-6).mean(1)
    return {"out": F.linear(x, weights["cls_head.weight"], weights["cls_head.bias"])}, merged


def _merged_maps(weights: Weights, maps: list[Tensor]) -> Tensor:
    """Detection's merge before the feature pyramid: [n, C_1, h, w]."""
    total: Tensor | float = 0.0
    grid = (maps[-1].shape[-2], maps[-1].shape[-1])
    for index, image in enumerate(maps):
        name, x = f"merge_branch{index + 1}", image
        for conv, norm in ((0, 1), (3, 4)):
            x = F.conv2d(x, weights[f"{name}.{conv}.weight"], padding=1)
            x = F.relu(_group_norm(weights, f"{name}.{norm}", x))
        total = total + weights[f"w{index + 1}"] * resize_map(x, grid)
    assert isinstance(total, Tensor)
    return total
