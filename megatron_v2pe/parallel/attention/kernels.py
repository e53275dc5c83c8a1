"""Attention of blocks of queries to blocks of keys, with the log-sum-exp that lets blocks be merged.

    out = softmax(scale * q k^T) v        lse = log sum exp(scale * q k^T)

torch's fused kernels, called by its private operators: flash for the CPU (any dtype), flash (bf16, fp16) or memory
efficient (float32) on CUDA. The public `scaled_dot_product_attention` hides the log-sum-exp.

A call computes n blocks of equal shape, one after the other in dimension 0. Grouped heads (GQA) of one block are
not repeated: queries become a batch of g = h / k members over k heads, and keys are given to that batch with
stride 0. (Several blocks, which are short, are repeated. CUDA's flash kernel supports grouped heads itself; the CPU's
keys are repeated, see `kernels_cpu`.)

Shape legend: n blocks, s queries and t keys of a block, h query heads, k key heads, g = h / k, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.kernels_cpu import cpu_backward, cpu_forward, torch_operator

LSE_ROWS = 32  # the memory efficient kernel needs its log-sum-exp padded to a multiple of this


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: int = 1, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of n blocks, without autograd.

    Args:
        q: [n*s, h, d], contiguous in d.
        k: [n*t, k, d].
        v: [n*t, k, d].
        blocks: n.
        causal: query i sees keys 0..i; needs s == t, because kernels differ in how they align other shapes.
        scale: factor of the scores.

    Returns:
        out: [n*s, h, d], float32 or better on the CPU, else in the dtype of `q`.
        lse: [n*s, h], float32 or better.
    """
    if _is_half_on_cuda(q):
        heads_first = (_heads_first(x, blocks) for x in (q, k, v))
        out, lse = torch_operator("_scaled_dot_product_flash_attention")(
            *heads_first, 0.0, causal, False, scale=scale
        )[:2]
        return _tokens_first(out), _tokens_first(lse.unsqueeze(-1)).squeeze(-1)
    if q.device.type != "cuda":
        return cpu_forward(*map(_working, (q, k, v)), blocks=blocks, causal=causal, scale=scale)
    out, lse = _efficient_forward(*_grouped(q, k, v, blocks), causal=causal, scale=scale)
    return _ungroup(out, blocks), _ungroup(lse.unsqueeze(-1), blocks).squeeze(-1)


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    blocks: int = 1,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """These blocks' share of the gradients, when `out` and `lse` are those of all blocks merged.

    Args:
        grad: [n*s, h, d], gradient of the merged output.
        q: [n*s, h, d].
        k: [n*t, k, d].
        v: [n*t, k, d].
        out: [n*s, h, d], merged output.
        lse: [n*s, h], merged log-sum-exp.
        blocks: n.
        causal: as in `block_forward`.
        scale: as in `block_forward`.

    Returns:
        Gradients of q, k and v, in the precision of `block_forward`'s output.
    """
    if _is_half_on_cuda(q):
        return _flash_cuda_backward(grad, q, k, v, out, lse, blocks=blocks, causal=causal, scale=scale)
    if q.device.type != "cuda":
        working = map(_working, (grad, q, k, v, out, lse))
        return cpu_backward(*working, blocks=blocks, causal=causal, scale=scale)
    grouped = _grouped(q, k, v, blocks)
    grad, out, lse = (_group(x, k.shape[1], blocks) for x in (grad, out, lse.unsqueeze(-1)))
    lse = lse.squeeze(-1).contiguous()
    dq, dk, dv = _efficient_backward(grad, *grouped, out, lse, causal=causal, scale=scale)
    return _ungroup(dq, blocks), _sum_group(dk, blocks), _sum_group(dv, blocks)


def _is_half_on_cuda(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def _heads_first(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(0, (blocks, -1)).transpose(1, 2)  # [n*s, h, d] -> [n, h, s, d]


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [n, h, s, d] -> [n*s, h, d]


def _working(x: Tensor) -> Tensor:
    """The CPU kernel's bf16 backward is 5 to 10 times slower than its float32 one, and less exact."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if is_half and x.device.type != "cuda" else x


def _group(x: Tensor, key_heads: int, blocks: int) -> Tensor:
    split = _working(x).unflatten(0, (blocks, -1)).unflatten(2, (key_heads, -1))  # [n, s, k, g, d]
    return split.permute(0, 3, 2, 1, 4).flatten(0, 1)  # -> [n*g, k, s, d]


def _ungroup(x: Tensor, blocks: int) -> Tensor:
    split = x.unflatten(0, (blocks, -1)).permute(0, 3, 2, 1, 4)  # [n*g, k, s, d] -> [n, s, k, g, d]
    return split.flatten(2, 3).flatten(0, 1)  # -> [n*s, h, d]


def _sum_group(x: Tensor, blocks: int) -> Tensor:
    members = x.unflatten(0, (blocks, -1))  # [n, g, k, t, d]
    total = members.sum(1) if members.shape[1] > 1 else members.squeeze(1)
    return total.transpose(1, 2).flatten(0, 1)  # [n, k, t, d] -> [n*t, k, d]


def _grouped(q: Tensor, k: Tensor, v: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // k.shape[1]
    queries = _group(q, k.shape[1], blocks)
    expanded = (
        _heads_first(_working(x), blocks).unsqueeze(1).expand(-1, groups, -1, -1, -1).flatten(0, 1)
        for x in (k, v)
    )  # [n, k, t, d] -> [n*g, k, t, d]; a view when n or g is 1
    return queries, next(expanded), next(expanded)


def _flash_cuda_backward(
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
    no_seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # only read with dropout
    no_boundaries = (None, None, len(q) // blocks, len(k) // blocks)
    dq, dk, dv = torch_operator("_scaled_dot_product_flash_attention_backward")(
        *(_heads_first(x, blocks) for x in (grad, q, k, v, out.to(q.dtype))),
        _heads_first(lse.unsqueeze(-1), blocks).squeeze(-1).contiguous(),
        *no_boundaries,
        *(0.0, causal, no_seed, no_seed),
        scale=scale,
    )
    return _tokens_first(dq), _tokens_first(dk), _tokens_first(dv)


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _refuse_float64(q)
    name = "_scaled_dot_product_efficient_attention"
    out, lse = torch_operator(name)(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_float64(q)
    # Infinity, as the forward kernel pads: rows after the last query get no probability.
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=float("inf"))
    no_seed = torch.zeros((), dtype=torch.int64)
    dq, dk, dv, _ = torch_operator("_scaled_dot_product_efficient_attention_backward")(
        *(grad, q, k, v, None, out.to(q.dtype), padded, no_seed, no_seed, 0.0),
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return dq, dk, dv


def _refuse_float64(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ConfigError("torch has no fused float64 attention on CUDA; run this check on the CPU")
