"""megatron-core's parallel linears and embedding without their machinery where a layer is whole on its rank.

    tp of one rank    output = input @ weight^T (+ bias); the product of the gradient adds to its buffer
                      output = weight[tokens]; rows of the gradient are added to those of the buffer
    more ranks        mcore's

mcore runs every product inside one autograd function and the sum over tp in another, whatever the number of ranks, and
the gradient of a weight is a new tensor that is then added to the buffer: on a CPU one page fault for each 4 KiB.
Outputs are mcore's to the bit; gradients are, in the first micro batch of a step; later ones are added in another
order (1e-7 of the largest entry).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

LARGE = 2**16
"""Entries of a weight from which adding in place is worth a Python function in backward."""


class _AddedInPlace(torch.autograd.Function):
    """x @ weight^T whose backward adds the weight's gradient to `weight.main_grad`, as mcore's CUDA kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = grad.matmul(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        weight.main_grad.addmm_(grad.t(), x.flatten(0, -2))
        weight.grad_added_to_main_grad = True  # mcore's hook then adds nothing, and frees what it is given
        return grad_x, torch.empty_like(weight)


class _LookedUp(torch.autograd.Function):
    """weight[tokens] whose backward adds to the rows of `weight.main_grad`, and leaves all other rows alone."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight  # itself: hooks of saved tensors may give back a copy, without the buffer
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens,), weight = ctx.saved_tensors, ctx.weight
        weight.main_grad.index_add_(0, tokens.flatten(), grads[0].flatten(0, -2))
        weight.grad_added_to_main_grad = True
        return None, torch.empty_like(weight)


def look_up(embedding: Any, tokens: Tensor, *, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """[1, l] tokens to [1, l, H] by mcore's embedding; `forward` is its own. Not for a weight that the head shares."""
    if embedding.tp_group.size() == 1 and _is_added_in_place(embedding.weight):
        return _LookedUp.apply(tokens, embedding.weight)
    return forward(tokens)


def _product(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(output, bias that the caller adds). A bias is added after the product, as in mcore: rounding differs else."""
    weight = linear.weight
    output = _AddedInPlace.apply(x, weight) if _is_added_in_place(weight) else F.linear(x, weight)
    if linear.skip_bias_add:
        return output, linear.bias
    return output if linear.bias is None else output + linear.bias, None


def _is_added_in_place(weight: Tensor) -> bool:
    """A large weight that is trained, on the CPU, with a gradient buffer in its own dtype."""
    if not weight.requires_grad or weight.numel() < LARGE or weight.device.type != "cpu":
        return False
    buffer = getattr(weight, "main_grad", None)
    return buffer is not None and buffer.dtype == weight.dtype


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
