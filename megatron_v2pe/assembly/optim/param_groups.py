"""Learning rate and weight decay of every parameter, by its name: groups of the optimizer, the same on all ranks.

    name --part, vision layer--> learning rate      name, dimensions --optim.decay--> decays or not
    both = Treatment --one ParamKey each--> mcore's parameter groups --OptimizerParamScheduler--> lr, weight_decay

mcore identifies a group, in a checkpoint and in itself, by (wd_mult, lr_mult) only, although only max_lr and min_lr
are scheduled. So `lr_mult` is set too: groups equal in both would get the learning rate of one of them.

The tower is never split over pipeline stages, so the number of a vision layer is the same in every layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megatron_v2pe.config.schema import OptimConfig

_WRAPPERS = re.compile(r"^(module\.)+")
_VISION_LAYER = re.compile(r"vision\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True, order=True)
class Treatment:
    """What parameters of one group have in common.

    Attributes:
        lr: peak learning rate.
        decays: weight decay is applied.
    """

    lr: float
    decays: bool


def treatment(name: str, num_dims: int, *, optim: OptimConfig, num_vision_layers: int) -> Treatment:
    """How a parameter is treated.

    Args:
        name: of the parameter in the model, without mcore's wrappers.
        num_dims: its dimensions; tensor parallelism does not change them.
        optim: section of the configuration.
        num_vision_layers: layers of the vision tower.
    """
    part = name.partition(".")[0]
    lr = optim.lr_of(part)
    if part == "vision":
        lr *= optim.vision_layer_decay ** _layers_above(name, num_vision_layers)
    return Treatment(lr=lr, decays=optim.decay == "release" or decays_usually(name, num_dims))


def decays_usually(name: str, num_dims: int) -> bool:
    """The usual rule: matrices, embeddings (class and positions of the tower among them), adapters; nothing else.

    Norms and layer scale have one dimension. This is Megatron's rule, and that of the release's own optimizer, which
    its ZeRO configurations leave unused.
    """
    return num_dims > 1 and not name.endswith("bias")


def _layers_above(name: str, num_layers: int) -> int:
    """1 for the last layer of the tower, num_layers for the first, one more for patches and positions."""
    layer = _VISION_LAYER.match(name)
    return num_layers - int(layer.group(1)) if layer else num_layers + 1


def group_overrides(
    model_chunks: Sequence[torch.nn.Module], optim: OptimConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """The overrides that mcore makes parameter groups of: one key for each treatment that differs from the plain one.

    Args:
        model_chunks: those of this rank, wrapped or bare; ranks hold different parts, and mcore joins their groups.
        optim: section of the configuration.
    """
    treated = dict(treated_parameters(model_chunks, optim))
    plain = Treatment(lr=optim.lr, decays=True)
    return {_key(each, treated): _override(each, optim) for each in sorted(set(treated.values()) - {plain})}


def treated_parameters(
    model_chunks: Sequence[torch.nn.Module], optim: OptimConfig
) -> Iterator[tuple[str, Treatment]]:
    """Every trained parameter of this rank with its treatment; names are those in the given model chunks."""
    num_layers = _num_vision_layers(model_chunks)
    for model_chunk in model_chunks:
        for name, parameter in model_chunk.named_parameters():
            if parameter.requires_grad:
                bare = _WRAPPERS.sub("", name)
                yield (
                    name,
                    treatment(bare, parameter.dim(), optim=optim, num_vision_layers=num_layers),
                )


def _num_vision_layers(model_chunks: Sequence[Any]) -> int:
    """Layers of the tower where this rank has it, else 0."""
    names = [
        _WRAPPERS.sub("", name) for model_chunk in model_chunks for name, _ in model_chunk.named_parameters()
    ]
    layers = {int(layer.group(1)) for name in names if (layer := _VISION_LAYER.match(name))}
    return len(layers)


def _key(wanted: Treatment, treated: dict[str, Treatment]) -> ParamKey:
    def is_meant(_parameter: torch.nn.Parameter, name: str) -> bool:
        return treated[name] == wanted

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=repr(wanted), fn=is_meant))


def _override(wanted: Treatment, optim: OptimConfig) -> ParamGroupOverride:
    share = wanted.lr / optim.lr
    override: dict[str, float] = {"wd_mult": float(wanted.decays)}
    if wanted.lr != optim.lr:
        override |= {"lr_mult": share, "max_lr": wanted.lr, "min_lr": optim.min_lr * share}
    return ParamGroupOverride(**override)  # type: ignore[typeddict-item]
