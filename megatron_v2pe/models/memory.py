"""What a model keeps for its backward pass, and what it recomputes instead.

    recompute full        a layer's input is kept, the layer runs again in backward          (mcore)
    recompute selective   an MLP's input is kept, the MLP runs again
    MLP chunks            ... one chunk of tokens after the other, inside either of the two
    slices of tiles       tower and projector run again slice by slice, so that one slice's activations exist

All of them use mcore's re-entrant checkpoint, the decoder's with FP8 linears Transformer Engine's: backward runs the
part again under the generator state of its forward pass, and the gradients of each MLP chunk or slice are added to
the float32 gradient buffers in turn. (These parts therefore reach a parameter's gradient hook several times in a
micro batch, which mcore's `overlap_grad_reduce` does not allow.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_v2pe.models.offload import ActivationOffload


@dataclass(frozen=True, kw_only=True)
class MemorySavings:
    """How the language model trades time for memory; recompute itself is in mcore's configuration.

    Attributes:
        loss_chunk_tokens: supervised rows whose logits exist at a time.
        mlp_chunks: MLP chunks (of tokens) that are recomputed one by one; 0 keeps its activations.
        row_multiple: rows of an MLP chunk are a multiple of this, but of the last.
        offload: moves layer inputs to host memory until backward; None keeps them on the device.
    """

    loss_chunk_tokens: int
    mlp_chunks: int = 0
    row_multiple: int = 1
    offload: ActivationOffload | None = None


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) that keeps only `x`, also when `x` itself needs no gradient but parameters inside do.

    A re-entrant checkpoint none of whose inputs needs a gradient gives its parameters none, silently; the empty
    second input needs one.
    """
    anchor = torch.empty(0, device=x.device, requires_grad=True)
    return checkpoint(lambda kept, _anchor: function(kept), False, x, anchor)


def is_trained(part: torch.nn.Module) -> bool:
    """Whether any parameter of a part gets gradients."""
    return any(parameter.requires_grad for parameter in part.parameters())


class RecomputingLayer(TransformerLayer):
    """mcore's layer, whose MLP may be recomputed in backward, in MLP chunks of its rows.

    mcore's own recomputation of the MLP (`recompute_modules`) returns the bias of the second linear out of the
    checkpoint, which turns that parameter into a computed tensor: towers with biases never finish backward.
    mcore gives its process group to the exact class `MLP` only, so the MLP stays one and its forward is wrapped.

    Args:
        mlp_chunks: MLP chunks that are recomputed one by one; 0 keeps the MLP's activations. Experts are one piece.
        row_multiple: rows of an MLP chunk are a multiple of this, but of the last.
        mlp_forward: (MLP, rows) -> (output, bias), in place of the MLP's own forward.
    """

    def __init__(
        self,
        *args: Any,
        mlp_chunks: int,
        row_multiple: int = 1,
        mlp_forward: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if mlp_forward is not None:
            self.mlp.forward = partial(mlp_forward, self.mlp)
        if mlp_chunks and self.is_moe_layer:
            self.mlp.forward = partial(_experts_again, self.mlp.forward, self.mlp.router)
        elif mlp_chunks:
            chunks = _MlpChunks(number=mlp_chunks, row_multiple=row_multiple, config=self.config)
            self.mlp.forward = partial(_in_chunks, self.mlp.forward, chunks)

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """mcore's forward; a router is given first what it must know of the micro batch, also when it runs again."""
        if self.is_moe_layer:
            self.mlp.router.routed = getattr(packed_seq_params, "routed", None)
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def _experts_again(
    forward: Callable[..., tuple[Tensor, Tensor | None]], router: Any, hidden: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Output of a mixture of experts, whole: its router's losses are of all rows of its micro batch."""
    routed = router.routed

    def run(rows: Tensor) -> Tensor:
        router.routed = routed  # backward of another micro batch may have come between
        return forward(rows, **kwargs)[0]

    return checkpoint(run, False, hidden), None


@dataclass(frozen=True, kw_only=True)
class _MlpChunks:
    """How an MLP's rows are cut, and how each part runs again."""

    number: int
    row_multiple: int
    config: TransformerConfig

    def split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """At most `number` parts of equal rows, a multiple of `row_multiple`; the last may have fewer."""
        rows = -(-len(hidden) // self.number)
        return hidden.split(-(-rows // self.row_multiple) * self.row_multiple)

    def run(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """function(rows), again in backward; with FP8 by Transformer Engine's checkpoint, or that were in bfloat16.

        Its checkpoint counts forward passes, so one without a backward pass is left alone.
        """
        if self.config.fp8 is None:
            return checkpoint(function, False, rows)
        if not torch.is_grad_enabled():
            return function(rows)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(function, False, get_cuda_rng_tracker, None, rows)


def _in_chunks(
    forward: Callable[..., tuple[Tensor, Tensor | None]], chunks: _MlpChunks, hidden: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """An MLP's output [s, b, H], its bias added, one MLP chunk of rows after the other."""

    def biased(rows: Tensor) -> Tensor:
        output, bias = forward(rows, **kwargs)
        return output if bias is None else output + bias

    return torch.cat([chunks.run(biased, rows) for rows in chunks.split(hidden)]), None
