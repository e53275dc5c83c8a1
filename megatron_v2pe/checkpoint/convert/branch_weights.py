"""Weights of a smaller branch: from an InternViT folder, from a timm vision transformer, or random.

    timm (DeiT, DeiT III, AugReg, MAE)          ours (InternViT's names)
    cls_token                                   embeddings.class_embedding
    pos_embed [1, N (+1), C]                    embeddings.position_embedding, bicubic to the branch's grid
    patch_embed.proj.{weight,bias}              embeddings.patch_embedding.*, kernel bicubic to the patch size
    blocks.{i}.norm1, attn.qkv, attn.proj, ...  encoder.layers.{i}.*
    blocks.{i}.ls1.gamma | gamma_1              encoder.layers.{i}.ls1, ones where there is none
    norm, head, fc_norm, head_dist              left out

A table without a row for the class token (DeiT III) gets one of zeros, which is what it means there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.models.piip.geometry import resize_patch_kernel, resize_positions

CLASS, POSITIONS = "embeddings.class_embedding", "embeddings.position_embedding"
PATCHES = "embeddings.patch_embedding."
LAYER_SCALE = 0.1  # InternViT's own start
_TIMM_NAMES = (
    (r"^cls_token$", CLASS),
    (r"^pos_embed$", POSITIONS),
    (r"^patch_embed\.proj\.", PATCHES),
    (r"^blocks\.(\d+)\.gamma_([12])$", r"encoder.layers.\1.ls\2"),
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layers.\1.ls\2"),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
)
_LEFT_OUT = re.compile(r"^(norm|fc_norm|head|head_dist|dist_token|mask_token|decoder_\w+)\b")


def branch_shapes(branch: VisionArchitecture) -> dict[str, tuple[int, ...]]:
    """InternViT's names and shapes for a branch."""
    width, hidden, patch = branch.hidden_size, branch.ffn_size, branch.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        CLASS: (1, 1, width),
        POSITIONS: (1, branch.num_positions, width),
        f"{PATCHES}weight": (width, 3, patch, patch),
        f"{PATCHES}bias": (width,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    vectors = ["norm1.weight", "norm2.weight", "ls1", "ls2"]
    if branch.norm_type == "layer_norm":
        vectors += ["norm1.bias", "norm2.bias"]
    if branch.qk_normalization:
        vectors += ["attn.q_norm.weight", "attn.k_norm.weight"]
    layer |= dict.fromkeys(vectors, (width,))
    if branch.qkv_bias:
        layer["attn.qkv.bias"] = (3 * width,)
    for index in range(branch.num_layers):
        shapes |= {f"encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def branch_tensors(
    branch: VisionArchitecture, source: Path | None, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tensors of a branch under InternViT's names, float32.

    Args:
        branch: sizes.
        source: an InternViT or InternVL folder, or a folder or safetensors file of a timm model; None draws.
        generator: of random weights.

    Raises:
        CheckpointError: the source cannot be read, or is of other sizes.
    """
    shapes = branch_shapes(branch)
    if source is None:
        return {name: _random(name, shape, generator) for name, shape in shapes.items()}
    tensors = _fitted(_renamed(_read(source)), branch)
    problems = [f"{name}: missing" for name in shapes if name not in tensors]
    problems += [f"{name}: the branch has no such tensor" for name in tensors if name not in shapes]
    problems += [
        f"{name}: has shape {tuple(tensor.shape)}, the recipe makes it {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    raise_problems(f"{source}: does not fit the branch of the recipe", problems)
    return tensors


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith(("ls1", "ls2")):
        return torch.full(shape, LAYER_SCALE)
    if name.endswith("norm.weight") or re.search(r"norm\d\.weight$", name):
        return torch.ones(shape)
    if len(shape) == 1:
        return torch.zeros(shape)
    return torch.nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator)


def _read(source: Path) -> dict[str, Tensor]:
    """All tensors of a folder or file, float32."""
    if source.is_file():
        try:
            return {name: tensor.float() for name, tensor in load_file(source).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{source}: cannot be read as safetensors ({error})") from None
    weights = HFWeights(source)
    raise_problems(f"{source}: cannot be used as a branch", weights.problems)
    return {name: weights.read(name).float() for name in weights.tensors}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under InternViT's names: of an InternVL folder the tower, of timm by the table above."""
    if any(name.startswith("vision_model.") for name in tensors):
        prefix = "vision_model."
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not any(name.startswith("blocks.") for name in tensors):
        return tensors
    found = {name: tensor for name, tensor in tensors.items() if not _LEFT_OUT.match(name)}
    renamed = {_timm_name(name): tensor for name, tensor in found.items()}
    layers = {match.group(1) for name in renamed if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    width = renamed[CLASS].shape[-1] if CLASS in renamed else 0
    for layer in layers:
        for scale in ("ls1", "ls2"):
            renamed.setdefault(f"encoder.layers.{layer}.{scale}", torch.ones(width))
    return renamed


def _timm_name(name: str) -> str:
    for pattern, replacement in _TIMM_NAMES:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _fitted(tensors: dict[str, Tensor], branch: VisionArchitecture) -> dict[str, Tensor]:
    """Positions and patch kernel at the branch's grid and patch size."""
    fitted = dict(tensors)
    resize: dict[str, Callable[[Tensor], Tensor]] = {
        POSITIONS: lambda table: _fitted_positions(table, branch),
        f"{PATCHES}weight": lambda kernel: resize_patch_kernel(kernel, branch.patch_size),
    }
    for name, function in resize.items():
        if name in fitted:
            fitted[name] = function(fitted[name])
    return fitted


def _fitted_positions(table: Tensor, branch: VisionArchitecture) -> Tensor:
    rows = table.shape[1]
    has_class = math.isqrt(rows) ** 2 != rows
    class_row, patches = (
        (table[:, :1], table[:, 1:]) if has_class else (torch.zeros_like(table[:, :1]), table)
    )
    side = branch.image_size // branch.patch_size
    return torch.cat([class_row, resize_positions(patches, (side, side))], dim=1)
