"""Our weights copied into the plain model, so that both compute the same loss.

Ours keep queries, keys and values of each group of heads together; the plain model all queries, then keys, then values.
"""

from __future__ import annotations

from typing import Any

import torch
from plain_model import PlainInternVL, Sizes
from torch import Tensor


def copy_weights(ours: Any, plain: PlainInternVL) -> None:
    """Fill `plain` with the weights of our model, one rank's whole one.

    Raises:
        ValueError: a weight of `plain` has no counterpart, or one of ours was not used.
    """
    named = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    table = _table(plain.sizes)
    missing, unused = set(dict(plain.named_parameters())) - set(table), set(named) - set(table.values())
    if missing or unused:
        raise ValueError(f"weights without a counterpart: {sorted(missing | unused)}")
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            value = named[table[name]]
            if ".qkv." in name:
                kv_heads = plain.sizes.vision_heads if name.startswith("tower") else plain.sizes.kv_heads
                heads = plain.sizes.vision_heads if name.startswith("tower") else plain.sizes.heads
                value = _queries_first(value, heads=heads, kv_heads=kv_heads)
            parameter.copy_(value[: len(parameter)].view_as(parameter))


def _queries_first(value: Tensor, *, heads: int, kv_heads: int) -> Tensor:
    groups = value.unflatten(0, (kv_heads, heads // kv_heads + 2, -1))  # [k, g + 2, d, ...]
    query, key, value = groups.split([heads // kv_heads, 1, 1], 1)
    return torch.cat([query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)])


def _table(sizes: Sizes) -> dict[str, str]:
    """Name of the plain model -> name of ours."""
    table = {
        "class_token": "vision.class_embedding",
        "positions": "vision.position_embedding",
        "patches.weight": "vision.patch_embedding.weight",
        "patches.bias": "vision.patch_embedding.bias",
        "embedding.weight": "language.embedding.word_embeddings.weight",
        "norm.weight": "language.decoder.final_layernorm.weight",
        "head.weight": "language.output_layer.weight",
    }
    for kind in ("weight", "bias"):
        table[f"projector.0.{kind}"] = f"projector.norm.{kind}"
        table[f"projector.1.{kind}"] = f"projector.mlp.linear_fc1.{kind}"
        table[f"projector.3.{kind}"] = f"projector.mlp.linear_fc2.{kind}"
    modules = {
        "norm1": "input_layernorm",
        "qkv": "self_attention.linear_qkv",
        "out": "self_attention.linear_proj",
        "norm2": "pre_mlp_layernorm",
        "up": "mlp.linear_fc1",
        "down": "mlp.linear_fc2",
    }
    for number in range(sizes.vision_layers):
        theirs, own = f"tower.{number}", f"vision.encoder.layers.{number}"
        table |= {f"{theirs}.scale{scale}": f"{own}.ls{scale}" for scale in (1, 2)}
        for mine, name in modules.items():
            table |= {f"{theirs}.{mine}.{kind}": f"{own}.{name}.{kind}" for kind in ("weight", "bias")}
    for number in range(sizes.layers):
        for mine, name in modules.items():
            mine = "gate_up" if mine == "up" else mine
            table[f"decoder.{number}.{mine}.weight"] = f"language.decoder.layers.{number}.{name}.weight"
    return table
