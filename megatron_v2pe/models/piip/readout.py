"""LLaVA's readout: what becomes of all branches of a pyramid at its end.

    rows of a tile --split--> every branch's map --resized to one grid, projected--> sum: one token for each cell

Shape legend: n tiles, P_b patches of branch b and C_b its channels, H output channels, (h, w) grid of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_v2pe.config.arch.pyramid import GROUPS
from megatron_v2pe.models.memory import is_trained, recomputed
from megatron_v2pe.models.piip.geometry import Grid, map_to_tokens, resize_map, tokens_to_map


class _ToTokens(torch.nn.Module):
    """[n, C, h, w] to [n, h*w, C]."""

    def forward(self, image: Tensor) -> Tensor:
        return map_to_tokens(image)


class _GroupNormOfTokens(torch.nn.GroupNorm):
    """GroupNorm over the whole map of tokens [n, N, C]."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


class PyramidProjector(torch.nn.Module):
    """LLaVA's readout: every branch's map at the finest grid, projected, summed; one token per cell.

    The names `branch{b}.{1,3,6}` (norm "group") and `branch{b}.{1,5}` (norm "layer") are the release's.

    Args:
        widths: channels of each branch.
        out_width: H.
        norm: between the linears: GroupNorm of 32 groups over the whole map, or LayerNorm without parameters.
        out_grid: grid of the tokens; None is that of the last (finest) branch.
        dtype: of the parameters.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        out_width: int,
        *,
        norm: Literal["group", "layer"] = "group",
        out_grid: Grid | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_grid = out_grid
        self.num_branches = len(widths)
        for index, width in enumerate(widths):
            first = torch.nn.Linear(width, out_width, dtype=dtype)
            last = torch.nn.Linear(out_width, out_width, dtype=dtype)
            parts: dict[int, torch.nn.Module] = {0: _ToTokens(), 1: first}
            if norm == "group":
                parts |= {3: _GroupNormOfTokens(GROUPS, out_width, dtype=dtype), 5: torch.nn.GELU(), 6: last}
            else:
                parts |= {
                    2: torch.nn.LayerNorm(out_width, elementwise_affine=False),
                    4: torch.nn.GELU(),
                    5: last,
                }
            branch = torch.nn.ModuleDict({str(key): module for key, module in parts.items()})
            self.add_module(f"branch{index + 1}", branch)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [n, C_b, h_b, w_b] to tokens [n, h*w, H]."""
        grid = self.out_grid or tuple(maps[-1].shape[-2:])
        total = None
        for index, image in enumerate(maps):
            x = resize_map(image, (grid[0], grid[1]))
            for part in self.get_submodule(f"branch{index + 1}").values():  # type: ignore[operator]
                x = part(x)
            total = x if total is None else total + x
        assert total is not None
        return total


class PyramidReadout(MegatronModule):
    """`PyramidProjector` in the place of InternVL's projector; whole on every rank, also where the tower is split.

    Args:
        config: mcore's configuration; `hidden_size` is the language model's H.
        widths: C_b of every branch, the large one first.
        grids: cells of every branch's map.
        side: cells on the side of the grid of the tokens.
        norm: see `PyramidProjector`.
        recomputes: keep only the rows while training; backward runs the projector again. One linear's output has T*H
            numbers a tile and branch, many times those of InternVL's projector where T is large.
        groups: process groups of the tower.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        widths: Sequence[int],
        grids: Sequence[Grid],
        side: int,
        norm: Literal["group", "layer"],
        recomputes: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.widths = tuple(widths)
        self.grids = tuple(grids)
        self.recomputes = recomputes
        self.merge = PyramidProjector(
            self.widths, config.hidden_size, norm=norm, out_grid=(side, side), dtype=config.params_dtype
        )

    def forward(self, rows: Tensor) -> Tensor:
        """What `PyramidTower` gives of a tile, [n, sum_b P_b*C_b], to features [n, side*side, H]."""
        has_gradients = torch.is_grad_enabled() and (rows.requires_grad or is_trained(self))
        if self.recomputes and self.training and has_gradients:
            return recomputed(self._merged, rows)
        return self._merged(rows)

    def _merged(self, rows: Tensor) -> Tensor:
        sizes = [height * width for height, width in self.grids]
        parts = rows.split([size * width for size, width in zip(sizes, self.widths, strict=True)], dim=1)
        maps = [
            tokens_to_map(part.unflatten(1, (size, width)), grid)
            for part, size, width, grid in zip(parts, sizes, self.widths, self.grids, strict=True)
        ]
        return self.merge(maps)
