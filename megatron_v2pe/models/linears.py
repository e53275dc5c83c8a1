"""megatron-core's parallel linears without their machinery where a layer is whole on its rank.

    tp of one rank    output = input @ weight^T (+ bias)          torch's own product and its own backward
    more ranks        mcore's

mcore runs every product inside an autograd function of its own and a second one for the sum over tp, whatever the
number of ranks; with short packs that costs more than the product. Both compute the same products, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def _product(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(output, bias that the caller adds). The bias is added after the product, as mcore does: rounding differs else."""
    output = F.linear(x, linear.weight)
    if linear.skip_bias_add:
        return output, linear.bias
    return output if linear.bias is None else output + linear.bias, None


def is_whole(linear: Any) -> bool:
    """Whether one rank holds the linear and nothing is exchanged around it."""
    return linear.tp_group.size() == 1 and not linear.sequence_parallel and not linear.explicit_expert_comm


class ColumnLinear(ColumnParallelLinear):
    """Splits its output over tp."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, C] to [s, b, F], and the bias where the caller adds it; see mcore for the arguments."""
        if args or kwargs or not is_whole(self):
            return super().forward(input_, *args, **kwargs)
        return _product(self, input_)


class RowLinear(RowParallelLinear):
    """Splits its input over tp."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, F] to [s, b, C], and the bias where the caller adds it."""
        return _product(self, input_) if is_whole(self) else super().forward(input_)
