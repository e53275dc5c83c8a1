"""InternViT with a pyramid of smaller InternViTs around it, which see the same tile at more pixels.

    every branch:  patches, class token, positions
    for each interval:   every branch runs its layers of the interval
                         neighbours exchange patch features, the finest pair first
    readout `large`:     the large branch's hidden states, as InternViT's
    readout `llava`:     patches of every branch, one after the other (`readout.py` projects and adds them)

The large branch keeps InternViT's parameter names; new ones are `branches.{b}.` and `interactions.{i}.`. With all
gates zero its hidden states and gradients are InternViT's, element for element.

Shape legend: n tiles, S_b pixels of branch b's side, P_b its patches (h*w), C_b its channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from torch import Tensor

from megatron_v2pe.config.arch.pyramid import interval_stops
from megatron_v2pe.models.memory import is_trained, recomputed
from megatron_v2pe.models.piip.geometry import Grid
from megatron_v2pe.models.piip.interaction import Interaction, InteractionSettings
from megatron_v2pe.models.vision import InternViT


class Branches(torch.nn.ModuleList):
    """Smaller towers, each with its own way of being stored: split over tp where the large one is."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """mcore's shards of every branch, below `{b}.`; mcore would store a plain list as if it were whole."""
        shards: dict[str, Any] = {}
        for index, branch in enumerate(self):
            shards.update(branch.sharded_state_dict(f"{prefix}{index}.", sharded_offsets, metadata))  # type: ignore[operator]
        return shards


class PyramidTower(InternViT):
    """The vision tower of a PIIP model.

    Args:
        branches: smaller towers, in the order in which they neighbour (the finest last).
        sizes: pixels of a tile's side of every branch, the large one first.
        num_interactions: intervals, each of which ends with an interaction.
        settings: of the interactions.
        returns_all: give patches of every branch; else the last interaction's ways into the smaller ones, which
            nothing would read, are not built.
        **large: arguments of `InternViT`, of the large branch.
    """

    def __init__(
        self,
        *args: Any,
        branches: Sequence[InternViT],
        sizes: Sequence[int],
        num_interactions: int,
        settings: InteractionSettings,
        returns_all: bool = False,
        **large: Any,
    ) -> None:
        super().__init__(*args, **large)
        self.branches = Branches(branches)
        self.sizes = tuple(sizes)
        self.returns_all = returns_all
        towers = self._towers()
        widths = tuple(tower.config.hidden_size for tower in towers)
        self.interactions = torch.nn.ModuleList(
            Interaction(
                widths,
                settings,
                into_smaller=returns_all or index < num_interactions - 1,
                dtype=self.config.params_dtype,
            )
            for index in range(num_interactions)
        )
        self.stops = [interval_stops(len(tower.encoder.layers), num_interactions) for tower in towers]

    def _towers(self) -> list[InternViT]:
        return [self, *self.branches]  # type: ignore[list-item]

    def split_sizes(self, pixels: Tensor) -> list[Tensor]:
        """Rows [n, sum_b 3*S_b*S_b] to the tiles [n, 3, S_b, S_b] of every branch."""
        lengths = [3 * size * size for size in self.sizes]
        parts = pixels.split(lengths, dim=1)
        return [part.reshape(-1, 3, size, size) for part, size in zip(parts, self.sizes, strict=True)]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised rows [n, sum_b 3*S_b*S_b], large branch's tile first, to what the readout takes.

        Returns:
            The large branch's hidden states [n, 1 + P, C]. With `returns_all` rows again, so that one tensor passes
            through slices and recomputation: patches of every branch, [n, sum_b P_b*C_b], class tokens left out.
        """
        states = self.hidden_states(self.split_sizes(pixels))
        if not self.returns_all:
            return states[0]
        return torch.cat([state[:, 1:].flatten(1) for state in states], dim=1)

    def hidden_states(self, tiles: Sequence[Tensor]) -> list[Tensor]:
        """Tiles [n, 3, S_b, S_b] of every branch to hidden states [n, 1 + P_b, C_b], class token first.

        Without `returns_all` those of the smaller branches end before the last interaction.
        """
        last: list[Tensor] = []
        for last in self.states(tiles):  # noqa: B007  # earlier states are dropped as soon as they are replaced
            pass
        return last

    def states(self, tiles: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Hidden states of all branches: embedded, then after each interaction; see `hidden_states`."""
        towers = self._towers()
        states = [tower.embed(image) for tower, image in zip(towers, tiles, strict=True)]
        yield states
        grids: list[Grid] = [
            (image.shape[-2] // tower.patch_size, image.shape[-1] // tower.patch_size)
            for tower, image in zip(towers, tiles, strict=True)
        ]
        for index, interaction in enumerate(self.interactions):
            states = [
                self._run_interval(tower, stops, index, state)
                for tower, stops, state in zip(towers, self.stops, states, strict=True)
            ]
            states = self._interact(interaction, states, grids)  # type: ignore[arg-type]
            yield states

    def _run_interval(self, tower: InternViT, stops: tuple[int, ...], index: int, state: Tensor) -> Tensor:
        """Layers of one interval of a branch: [n, 1 + P, C] to the same shape."""
        start = stops[index - 1] if index else 0
        x_snc = state.transpose(0, 1).contiguous()
        is_recomputed = self.training and self.config.recompute_granularity == "full"
        for layer in tower.encoder.layers[start : stops[index]]:

            def run(x: Tensor, layer: torch.nn.Module = layer) -> Tensor:
                return layer(hidden_states=x, attention_mask=None)[0]

            keeps_graph = x_snc.requires_grad or is_trained(layer)
            x_snc = recomputed(run, x_snc) if is_recomputed and keeps_graph else run(x_snc)
        return x_snc.transpose(0, 1)

    def _interact(self, interaction: Interaction, states: list[Tensor], grids: list[Grid]) -> list[Tensor]:
        """Exchange patches; class tokens are neither queries nor values. Recomputed in backward while training."""
        classes = [state[:, :1] for state in states]
        patches = [state[:, 1:] for state in states]

        def exchange(*tokens: Tensor) -> tuple[Tensor, ...]:
            return tuple(interaction(list(tokens[: len(patches)]), grids))

        if self.training and torch.is_grad_enabled() and self.config.recompute_granularity is not None:
            anchor = torch.empty(0, device=patches[0].device, requires_grad=is_trained(interaction))
            mixed = checkpoint(exchange, False, *patches, anchor)
        else:
            mixed = exchange(*patches)
        return [torch.cat(pair, dim=1) for pair in zip(classes, mixed, strict=True)]
