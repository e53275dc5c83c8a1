"""Attention of one block of queries to one block of keys, with the log-sum-exp that lets blocks be merged.

    out = softmax(scale * q k^T) v        lse = log sum exp(scale * q k^T)

torch's fused kernels behind its private operators: flash for the CPU (any dtype), flash (bf16, fp16) or memory
efficient (float32) on CUDA. The public `scaled_dot_product_attention` hides the log-sum-exp.

Grouped heads (GQA) are not repeated: queries become a batch of g = h / k members over k heads, and keys
are given to that batch with stride 0. CUDA's flash kernel takes grouped heads itself.

Shape legend: s queries, t keys, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.core.errors import ConfigError

LSE_ROWS = 32  # the memory efficient kernel wants its log-sum-exp padded to a multiple of this


def block_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One block, without autograd.

    Args:
        q: [s, h, d], contiguous in d.
        k: [t, k, d].
        v: [t, k, d].
        causal: query i sees keys 0..i; needs s == t, because kernels differ in how they align other shapes.
        scale: factor of the scores.

    Returns:
        out: [s, h, d], float32 or better on the CPU, else in the dtype of `q`.
        lse: [s, h], float32 or better.
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out, lse = _op("_scaled_dot_product_flash_attention")(
            _heads_first(q), _heads_first(k), _heads_first(v), 0.0, causal, False, scale=scale
        )[:2]
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    grouped = _grouped(q, k, v)
    if q.device.type == "cuda":
        out, lse = _efficient_forward(*grouped, causal=causal, scale=scale)
    else:
        out, lse = _op("_scaled_dot_product_flash_attention_for_cpu")(*grouped, 0.0, causal, scale=scale)
    return _ungroup(out), lse.permute(2, 1, 0).reshape(q.shape[:2])  # [g, k, s] -> [s, h]


def block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients, when `out` and `lse` are those of all blocks merged.

    Args:
        grad: [s, h, d], gradient of the merged output.
        q: [s, h, d].
        k: [t, k, d].
        v: [t, k, d].
        out: [s, h, d], merged output.
        lse: [s, h], merged log-sum-exp.
        causal: as in `block_forward`.
        scale: as in `block_forward`.

    Returns:
        Gradients of q, k and v, in the precision of `block_forward`'s output.
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _flash_cuda_backward(grad, q, k, v, out, lse, causal=causal, scale=scale)
    grouped = _grouped(q, k, v)
    grad_out, out = _group(grad, k.shape[1]), _group(out, k.shape[1])
    lse = lse.unflatten(1, (k.shape[1], -1)).permute(2, 1, 0).contiguous()  # [s, h] -> [g, k, s]
    if q.device.type == "cuda":
        gradients = _efficient_backward(grad_out, *grouped, out, lse, causal=causal, scale=scale)
    else:
        name = "_scaled_dot_product_flash_attention_for_cpu_backward"
        gradients = _op(name)(grad_out, *grouped, out, lse, 0.0, causal, scale=scale)
    dq, dk, dv = gradients
    return _ungroup(dq), dk.sum(0).transpose(0, 1), dv.sum(0).transpose(0, 1)  # [k, t, d] -> [t, k, d]


def _op(name: str) -> Any:
    """A private operator of torch, or an error that says what to do without it."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is None:
        raise ConfigError(
            f"parallel.attention_backend resolves to 'native', but torch {torch.__version__} has no "
            f"aten.{name}; install a torch from 2.6 on, or use transformer_engine on a GPU"
        )
    return operator


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)  # [s, h, d] -> [1, h, s, d]


def _working(x: Tensor) -> Tensor:
    """The CPU kernel's bf16 backward is 5 to 10 times slower than its float32 one, and less exact."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if is_half and x.device.type != "cuda" else x


def _group(x: Tensor, key_heads: int) -> Tensor:
    return _working(x).unflatten(1, (key_heads, -1)).permute(2, 1, 0, 3)  # [s, h, d] -> [g, k, s, d]


def _ungroup(x: Tensor) -> Tensor:
    return x.permute(2, 1, 0, 3).flatten(1, 2)  # [g, k, s, d] -> [s, h, d]


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    queries = _group(q, k.shape[1])
    keys, values = (_heads_first(_working(x)).expand(len(queries), -1, -1, -1) for x in (k, v))
    return queries, keys, values


def _flash_cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    no_seed = torch.zeros(2, dtype=torch.int64, device=q.device)  # only read with dropout
    gradients = _op("_scaled_dot_product_flash_attention_backward")(
        *(_heads_first(x) for x in (grad, q, k, v, out.to(q.dtype))),
        lse.transpose(0, 1).unsqueeze(0).contiguous(),  # [s, h] -> [1, h, s]
        None,
        None,
        len(q),
        len(k),
        0.0,
        causal,
        no_seed,
        no_seed,
        scale=scale,
    )
    dq, dk, dv = (gradient[0].transpose(0, 1) for gradient in gradients)
    return dq, dk, dv


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    _refuse_float64(q)
    name = "_scaled_dot_product_efficient_attention"
    out, lse = _op(name)(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_float64(q)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % LSE_ROWS))
    no_seed = torch.zeros((), dtype=torch.int64)
    dq, dk, dv, _ = _op("_scaled_dot_product_efficient_attention_backward")(
        *(grad, q, k, v, None, out.to(q.dtype), padded, no_seed, no_seed, 0.0),
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return dq, dk, dv


def _refuse_float64(q: Tensor) -> None:
    if q.dtype == torch.float64:
        raise ConfigError("torch has no fused float64 attention on CUDA; run this check on the CPU")
