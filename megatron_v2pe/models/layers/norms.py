"""RMSNorm and LayerNorm that mcore's layer specs accept and that allow sequence parallelism.

mcore's own torch norm refuses sequence parallelism. These set the attribute `sequence_parallel` on their
parameters, by which mcore sums their gradients over the tensor parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251  # the name of the type; the model sends nothing


_EXACT = (torch.float32, torch.float64)  # in which the order of rounding and weighing does not matter


class Norm(torch.nn.Module):
    """Normalises the last dimension; the kind is `config.normalization`.

    RMSNorm normalises in float32, casts to the input's dtype and multiplies by the weight after, as the
    release does (reference: InternLM2RMSNorm); the order matters in bf16. In float32 and float64 on the CPU it is
    `_RMSNorm`, the same numbers by fewer passes over memory.

    Args:
        config: mcore's configuration (normalization, params_dtype, sequence_parallel).
        hidden_size: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused_by_local_norms: Any
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.is_rms = config.normalization == "RMSNorm"
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if not self.is_rms:
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype."""
        if not self.is_rms:
            return F.layer_norm(x, (self.hidden_size,), self.weight, self.bias, self.eps)
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype in _EXACT:
            return _RMSNorm.apply(x, self.weight, self.eps)
        working = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(working, (self.hidden_size,), None, self.eps).to(x.dtype) * self.weight


class _RMSNorm(torch.autograd.Function):
    """x r w with r = rsqrt(mean x^2 + eps), [..., H]; keeps its input alone.

        dw = sum over rows of g x r          dx = r (g w - x r^2 / H sum over H of g w x)

    torch forms backward of several operations, with as many tensors: 2.6 ms for 1,024 rows of 512, here 1.6.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size = len(weight)
        rows, grad = x.reshape(-1, size), grads[0].reshape(-1, size)
        mean_square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square() / size
        scale = (mean_square + ctx.eps).rsqrt()
        product = grad * rows
        along = (product @ weight).unsqueeze(1) * scale.square() / -size
        grad_weight = product.mul_(scale).sum(0) if ctx.needs_input_grad[1] else None
        del product
        grad_x = (grad * weight).addcmul_(rows, along).mul_(scale) if ctx.needs_input_grad[0] else None
        return None if grad_x is None else grad_x.view(x.shape), grad_weight, None


def _identity(x: Tensor) -> Tensor:
    return x


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over a dimension that is split over tp ranks.

    Args:
        config: mcore's configuration (params_dtype).
        hidden_size: size of this rank's slice; padding in it must be zero.
        eps: added to the mean square.
        whole_size: size of the whole dimension, without padding.
        sum_over_tp: port; differentiable sum of [..., 1] over the slices. Its gradient is summed too.
        tp_group: opaque to this module; mcore's checkpoints ask for it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        whole_size: int,
        sum_over_tp: Callable[[Tensor], Tensor] = _identity,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.whole_size = whole_size
        self.sum_over_tp = sum_over_tp
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape and dtype; float32 inside, weight last, as `Norm`."""
        working = x if x.dtype == torch.float64 else x.float()
        mean_square = self.sum_over_tp(working.square().sum(-1, keepdim=True)) / self.whole_size
        return (working * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The slice of this rank along dimension 0; the last slices may end in padding."""
        shards = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        shards[f"{prefix}weight"].allow_shape_mismatch = True
        return shards
