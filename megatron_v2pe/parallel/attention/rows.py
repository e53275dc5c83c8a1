"""Attention of query rows to a head-major cache of keys, and the merging of parts by their log-sum-exp.

    queries [t, h, d] --fold--> rows [k, t*g, d]      every key head is read once for all g = h / k query heads
    out, lse = softmax(scale * rows K^T) V, log sum exp(scale * rows K^T)          no mask: all keys are in the past

    lse = log(e^a + e^b),  out = (out_a e^a + out_b e^b) / (e^a + e^b), written with a sigmoid so that nothing overflows

Few rows (decoding) are two batched products on the CPU, which read keys and values at the speed of memory; a flash
kernel is made for many rows and takes twice as long for few.

Shape legend: t new tokens, T keys, h query heads, k key heads, g = h / k, r = t*g rows, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_v2pe.parallel.attention.kernels import _efficient_forward
from megatron_v2pe.parallel.attention.kernels_cpu import torch_operator

FEW_ROWS = 32  # of one key head; above, the flash kernel of the CPU is the faster one
KEYS_AT_ONCE = 65536  # bounds the scores of few rows: 8 MiB for 32 rows in float32
MIN_ROWS = 4  # a float32 product with fewer rows reads values at half the speed


@dataclass
class Partial:
    """Attention to a part of the keys.

    Attributes:
        out: [..., d], float32 or better.
        lse: [...], log-sum-exp of the scores; -inf where no key was seen, and `out` is zero.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, rows: Tensor) -> Partial:
        """Attention of rows [..., d] to nothing."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        lse = torch.full(rows.shape[:-1], float("-inf"), dtype=dtype, device=rows.device)
        return cls(torch.zeros_like(rows, dtype=dtype), lse)

    def add(self, other: Partial) -> None:
        """Merge another part of the keys into this one, in place."""
        share = torch.sigmoid(other.lse - self.lse)
        # -inf minus -inf is not a number: neither part has keys, and any share of zeros is zero.
        share = torch.where(other.lse == float("-inf"), torch.zeros_like(share), share).unsqueeze(-1)
        self.out = torch.lerp(self.out, other.out.to(self.out.dtype), share)
        self.lse = torch.logaddexp(self.lse, other.lse.to(self.lse.dtype))


def fold(query: Tensor, key_heads: int) -> Tensor:
    """[t, h, d] to rows [k, t*g, d]; head i of key head j is query head j*g + i."""
    return query.unflatten(1, (key_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)  # [t,k,g,d] -> [k,t,g,d]


def unfold(rows: Tensor, tokens: int) -> Tensor:
    """Rows [k, t*g, ...] back to [t, h, ...]."""
    split = rows.unflatten(1, (tokens, -1)).transpose(0, 1)  # [k, t, g, ...] -> [t, k, g, ...]
    return split.flatten(1, 2)


def attend_rows(rows: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Partial:
    """Attention of all rows to all keys, without gradients and without a mask.

    Args:
        rows: [k, r, d].
        keys: [k, T, d], T at least 1, in the dtype of `rows`.
        values: [k, T, d].
        scale: factor of the scores.
    """
    if rows.device.type == "cuda":
        return _on_cuda(rows, keys, values, scale)
    if rows.shape[1] > FEW_ROWS:
        out, lse = torch_operator("_scaled_dot_product_flash_attention_for_cpu")(
            *(x.unsqueeze(0) for x in (rows, keys, values)), 0.0, False, scale=scale
        )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return Partial(out.squeeze(0).to(dtype), lse.squeeze(0).to(dtype))
    parts = zip(keys.split(KEYS_AT_ONCE, 1), values.split(KEYS_AT_ONCE, 1), strict=True)
    total = Partial.empty(rows)
    for some_keys, some_values in parts:
        total.add(_few_rows(rows, some_keys, some_values, scale))
    return total


def _few_rows(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    product = _few_rows_wide if rows.dtype in (torch.float32, torch.float64) else _few_rows_half
    return product(rows * scale, keys, values)


def _few_rows_half(rows: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """Scores and weights are float32, keys and values stay as they are stored."""
    scores = torch.bmm(rows, keys.transpose(1, 2)).float()
    weights = scores.softmax(-1)
    # The largest weight is exp(largest score - lse); one pass less than torch's logsumexp and exp.
    lse = scores.amax(-1) - weights.amax(-1).log()
    return Partial(torch.bmm(weights.to(values.dtype), values).float(), lse)


def _few_rows_wide(rows: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """Keys first: the other order reads them at half the speed. Weights get rows of zeros up to `MIN_ROWS`."""
    count = rows.shape[1]
    scores = torch.bmm(keys, rows.transpose(1, 2)).transpose(1, 2)  # [k, T, r] -> [k, r, T]
    padded = scores.new_zeros(len(scores), max(count, MIN_ROWS), scores.shape[2])
    weights = padded[:, :count].copy_(scores)
    largest = weights.amax(-1, keepdim=True)
    total = weights.sub_(largest).exp_().sum(-1, keepdim=True)
    out = torch.bmm(padded, values)[:, :count] / total
    return Partial(out, (largest + total.log()).squeeze(-1))


def _on_cuda(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    heads_first = tuple(x.unsqueeze(0) for x in (rows, keys, values))
    if rows.dtype in (torch.bfloat16, torch.float16):
        found = torch_operator("_scaled_dot_product_flash_attention")(
            *heads_first, 0.0, False, False, scale=scale
        )
        out, lse = found[0], found[1]
    else:
        out, lse = _efficient_forward(*heads_first, causal=False, scale=scale)
    return Partial(out.squeeze(0).float(), lse.squeeze(0).float())
