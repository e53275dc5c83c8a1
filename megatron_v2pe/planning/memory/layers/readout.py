"""LLaVA's readout of a pyramid as a tape: what `models/piip/readout.py` allocates.

    patches of a branch -> map at the grid of the tokens -> rows -> fc1 -> norm -> gelu -> fc2 -> added to the others'

Nothing of it is split over tensor parallel ranks. Sizes of tensors are bytes.

Shape legend: n tiles, T tokens of a tile, P_b patches of branch b and C_b its channels, H language channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import tower_branches
from megatron_v2pe.planning.memory.layers.operations import LayerCosts, linear_op
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """What one branch's part of the readout is made of."""

    number: int
    patches: float
    resized: float
    hidden: float
    first_weight: float
    second_weight: float


def readout_ops(arch: InternVLArchitecture, *, tiles: int, costs: LayerCosts) -> list[Op]:
    """Every branch projected, one after the other, and their sum; the input is the patches of all branches."""
    assert arch.pyramid is not None
    e, width = float(costs.element_bytes), arch.language.hidden_size
    tokens = tiles * arch.tokens_per_tile
    ops: list[Op] = []
    total = ""
    for number, (vision, rows) in enumerate(tower_branches(arch)):
        branch = _Branch(
            number=number,
            patches=tiles * (rows - 1) * vision.hidden_size * e,
            resized=tokens * vision.hidden_size * e,
            hidden=tokens * width * e,
            first_weight=width * vision.hidden_size * e,
            second_weight=width * width * e,
        )
        ops += _branch_ops(branch, costs, is_group=arch.pyramid.readout_norm == "group")
        output = ops[-1].name
        if total:
            ops.append(
                Op(
                    name=f"sum {number}",
                    inputs=(total, output),
                    output_bytes=branch.hidden,
                    passes_gradient=True,
                )
            )
        total = ops[-1].name
    return ops


def _branch_ops(branch: _Branch, costs: LayerCosts, *, is_group: bool) -> list[Op]:
    """One branch, from its patches to its share of the features."""

    def own(name: str) -> str:
        return f"readout {branch.number} {name}"

    def linear(name: str, source: str, sizes: tuple[float, float], weight: float) -> Op:
        return linear_op(
            own(name),
            own(source),
            role=name,
            input_bytes=sizes[0],
            output_bytes=sizes[1],
            weight_bytes=weight,
            costs=costs,
        )

    hidden = branch.hidden
    return [
        Op(
            name=own("patches"),
            inputs=(INPUT,),
            view_of=INPUT,
            output_bytes=branch.patches,
            gradient_bytes=(branch.patches,),
        ),
        Op(
            name=own("map"),
            inputs=(own("patches"),),
            output_bytes=branch.resized,
            gradient_bytes=(branch.patches,),
            # The map is put in order first, and so is its gradient.
            forward_bytes=branch.patches,
            backward_bytes=branch.resized,
        ),
        Op(name=own("rows"), inputs=(own("map"),), output_bytes=branch.resized, passes_gradient=True),
        linear("fc1", "rows", (branch.resized, hidden), branch.first_weight),
        Op(
            name=own("norm"),
            inputs=(own("fc1"),),
            output_bytes=hidden,
            keeps=() if is_group else (own("fc1"),),
            # GroupNorm reads channels first: it keeps a copy in that order.
            keeps_extra_bytes=hidden if is_group else 0.0,
            backward_bytes=hidden if is_group else 0.0,
        ),
        Op(name=own("gelu"), inputs=(own("norm"),), output_bytes=hidden, keeps=(own("norm"),)),
        Op(name=own("gelu rows"), inputs=(own("gelu"),), output_bytes=hidden, passes_gradient=True),
        linear("fc2", "gelu rows", (hidden, hidden), branch.second_weight),
    ]
