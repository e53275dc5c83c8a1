"""Attention of blocks on the CPU, of causal ones without their masked half.

    causal(s)  =  causal(first half), causal(second half), and the second half's queries to all keys of the first

torch's kernel for the CPU computes every score of a causal block below 768 queries, and throws those above the
diagonal away. Halved again and again, until pieces have about `PIECE` queries, a block needs little more than half of
its scores. All pieces of one size are one call of the kernel; parts are merged by their log-sum-exp.

    s     computed        1,024 tokens of 8 heads of 64: forward and backward 77 -> 65 ms, 512: 26 -> 19 ms
    256   0.63 of all
    1024  0.53 of all

Halves are summed in another order than one call would: results differ in the last bits (6e-7 of the largest entry).

Tensors stay as they are, token by token, and are given to the kernel as views; keys of grouped heads (GQA) are copied
once for each query head, as torch's public function does.

Shape legend: n blocks, s queries and t keys of a block, h query heads, k key heads, g = h / k, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.core.errors import ConfigError

PIECE = 64
"""Pieces have at least this many tokens, and less than twice as many."""
LEAST = 3 * PIECE
"""Shorter blocks are one piece: merging costs what halving saves."""


def torch_operator(name: str) -> Any:
    """A private operator of torch; raises where this torch does not have it."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        raise ConfigError(
            f"parallel.attention_backend resolves to 'native', but torch {torch.__version__} has no "
            f"aten.{name}; install a torch from 2.6 on, or use transformer_engine on a GPU"
        )
    return operator


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`kernels.block_forward` in float32 or float64.

    Args:
        q: [n*s, h, d].
        k: [n*t, k, d].
        v: [n*t, k, d].
        blocks: n.
        causal: query i sees keys 0..i; s equals t.
        scale: factor of the scores.

    Returns:
        out: [n*s, h, d].
        lse: [n*s, h].
    """
    length, levels = _length_and_levels(q, blocks, causal=causal)
    pieces, groups = blocks << levels, q.shape[1] // k.shape[1]
    q, k, v = (_padded(x, blocks, levels) for x in (q, _repeated(k, groups), _repeated(v, groups)))
    out, lse = _forward(*(_pieces(x, pieces) for x in (q, k, v)), causal=causal, scale=scale)
    while pieces > blocks:
        pieces //= 2
        earlier = (_half(k, pieces, 0), _half(v, pieces, 0))
        past, past_lse = _forward(_half(q, pieces, 1), *earlier, causal=False, scale=scale)
        _merge(_rows(out, pieces, 1), _rows(lse, pieces, 1), past, past_lse)
    return _cut(out, blocks, length), _cut(lse, blocks, length)


def cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    blocks: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.block_backward` in float32 or float64.

    Args:
        grad: [n*s, h, d].
        q: [n*s, h, d].
        k: [n*t, k, d].
        v: [n*t, k, d].
        out: [n*s, h, d].
        lse: [n*s, h].
        blocks: n.
        causal: as in `cpu_forward`.
        scale: factor of the scores.

    Returns:
        Gradients of q, k and v.
    """
    length, levels = _length_and_levels(q, blocks, causal=causal)
    pieces, key_heads, groups = blocks << levels, k.shape[1], q.shape[1] // k.shape[1]
    k, v = _repeated(k, groups), _repeated(v, groups)
    grad, q, k, v, out, lse = (_padded(x, blocks, levels) for x in (grad, q, k, v, out, lse.unsqueeze(-1)))
    inputs = (grad, q, k, v, out, lse)
    totals = _backward(*(_pieces(x, pieces) for x in inputs), causal=causal, scale=scale)
    while pieces > blocks:
        pieces //= 2
        late = [_half(x, pieces, 1) for x in (grad, q, out, lse)]
        early = [_half(x, pieces, 0) for x in (k, v)]
        parts = _backward(late[0], late[1], *early, *late[2:], causal=False, scale=scale)
        for total, part, half in zip(totals, parts, (1, 0, 0), strict=True):
            rows = _rows(total, pieces, half)
            rows += part.view(rows.shape)
    dq, dk, dv = (_cut(x, blocks, length) if levels else x for x in totals)
    if groups > 1:
        dk, dv = (x.unflatten(1, (key_heads, groups)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _length_and_levels(q: Tensor, blocks: int, *, causal: bool) -> tuple[int, int]:
    """Queries of a block, and how often it is halved."""
    length = len(q) // blocks
    return length, (length // PIECE).bit_length() - 1 if causal and length >= LEAST else 0


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Keys [t, k, d] once for each query head, [t, h, d]."""
    return torch.stack([x] * groups, 2).flatten(1, 2) if groups > 1 else x  # repeat_interleave is slower


def _padded(x: Tensor, blocks: int, levels: int) -> Tensor:
    """Blocks [n*s, ...] with zeros at their ends, so that they can be halved; no query before sees them."""
    length = len(x) // blocks
    missing = -length % (1 << levels)
    if not missing:
        return x
    return F.pad(x.unflatten(0, (blocks, length)), (0, 0, 0, 0, 0, missing)).flatten(0, 1)


def _cut(x: Tensor, blocks: int, length: int) -> Tensor:
    """Without the zeros."""
    return x if len(x) == blocks * length else x.unflatten(0, (blocks, -1))[:, :length].flatten(0, 1)


def _pieces(x: Tensor, pieces: int) -> Tensor:
    """[t, h, d] to what kernels are given, [pieces, h, w, d]; a view."""
    return x.unflatten(0, (pieces, -1)).transpose(1, 2)


def _half(x: Tensor, pieces: int, half: int) -> Tensor:
    """First (0) or second (1) half of every piece, [pieces, h, w / 2, d]; a view."""
    return x.unflatten(0, (pieces, 2, -1))[:, half].transpose(1, 2)


def _rows(x: Tensor, pieces: int, half: int) -> Tensor:
    """Half of every piece, [pieces, w / 2, h, ...]; a view of contiguous [t, h, ...]."""
    return x.view(pieces, 2, -1, *x.shape[1:])[:, half]


def _merge(out: Tensor, lse: Tensor, past: Tensor, past_lse: Tensor) -> None:
    """Add the attention to earlier keys, in place; see `blockwise._Merged`."""
    past, past_lse = past.view(out.shape), past_lse.view(lse.shape)
    out.lerp_(past, torch.sigmoid(past_lse - lse).unsqueeze(-1))
    torch.logaddexp(lse, past_lse, out=lse)


def _forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[pieces, h, w, d] to out [t, h, d] and log-sum-exp [t, h], contiguous."""
    kernel = torch_operator("_scaled_dot_product_flash_attention_for_cpu")
    out, lse = kernel(q, k, v, 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2).contiguous().flatten(0, 1) for x in (out, lse))  # type: ignore[return-value]


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """[pieces, h, w, d], lse [pieces, h, w, 1], to gradients [t, h, d], contiguous."""
    kernel = torch_operator("_scaled_dot_product_flash_attention_for_cpu_backward")
    gradients = kernel(grad, q, k, v, out, lse.squeeze(-1).contiguous(), 0.0, causal, scale=scale)
    return tuple(x.transpose(1, 2).contiguous().flatten(0, 1) for x in gradients)
