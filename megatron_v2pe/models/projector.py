"""From vision channels to language channels: pixel shuffle, norm, two-layer MLP (release: `mlp1`).

Shape legend: n tiles, g patches of a tile's side, C vision channels, K visual tokens of a tile
(g*g/4 at ratio 0.5), H language channels.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_v2pe.models.layers.elementwise import ElementwiseOps, mlp_with_bias_gelu
from megatron_v2pe.models.layers.layer_specs import BackendModules, mlp_submodules


def pixel_shuffle(x_ngc: Tensor, *, ratio: float, version: Literal["v1", "v2"]) -> Tensor:
    """Trade resolution for channels: [n, g, g, C] to [n, K, C/ratio^2].

    v2: token (y, x) concatenates the patches (2y, 2x), (2y, 2x+1), (2y+1, 2x), (2y+1, 2x+1) at ratio 0.5.
    v1 holds the same vectors on the transposed grid (release: `pixel_shuffle`, `ps_version`).
    """
    n, height, width, channels = x_ngc.shape
    step = round(1 / ratio)
    x = x_ngc.reshape(n, height // step, step, width // step, step, channels)
    x = x.permute(0, 1, 3, 2, 4, 5)  # [n, y, dy, x, dx, C] -> [n, y, x, dy, dx, C]
    if version == "v1":
        x = x.transpose(1, 2)
    return x.reshape(n, -1, step * step * channels)


class Projector(MegatronModule):
    """LayerNorm, linear, GELU, linear.

    Args:
        config: mcore's configuration; `hidden_size` is the language model's H.
        modules: modules of the back end.
        input_size: channels after the pixel shuffle, C / ratio^2.
        ratio: downsample ratio of the pixel shuffle.
        version: order of the pixel shuffle.
        elementwise: how bias and GELU are computed.
        groups: singleton process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        modules: BackendModules,
        input_size: int,
        ratio: float,
        version: Literal["v1", "v2"],
        elementwise: ElementwiseOps,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.ratio = ratio
        self.version = version
        self.norm = modules.norm(config=config, hidden_size=input_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(
            config,
            mlp_submodules(modules),
            input_size=input_size,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=groups.tp,
        )
        self.mlp.forward = partial(mlp_with_bias_gelu, self.mlp, fused=elementwise.bias_gelu)

    def forward(self, hidden_npc: Tensor) -> Tensor:
        """Vision hidden states [n, 1 + g*g, C], class token first, to features [n, K, H]."""
        patches = hidden_npc[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        x = patches.reshape(len(patches), side, side, -1)  # [n, g*g, C] -> [n, g, g, C]
        x = pixel_shuffle(x, ratio=self.ratio, version=self.version)
        output, bias = self.mlp(self.norm(x))
        return output if bias is None else output + bias


def features_to_rows(features_nkh: Tensor) -> Tensor:
    """[n, K, H] to [n*K, H]: feature rows, numbered tile by tile."""
    return torch.flatten(features_nkh, 0, 1)
