"""Windows and sinks by the plain formula: float64, an explicit mask, one logit more."""

from functools import lru_cache

import torch

DIM = 8


def draw(lengths, *, dtype=torch.float64, has_sink=False, heads=4, key_heads=2):
    """[query, key, value, sink or None], and a gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(sum(lengths), count, DIM) for count in (heads, key_heads, key_heads, heads)]
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    sink = 1.5 * torch.randn(heads, generator=generator, dtype=torch.float64)
    return [query, key, value, sink.to(dtype) if has_sink else None], grad


def windowed_attention(query, key, value, sink, lengths, *, window, sinks=1):
    """Softmax attention of packed documents [s, h, d]."""
    count = len(query)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(count)[:, None] - torch.arange(count)
    mask = (document[:, None] == document) & (age >= 0)
    if window is not None:
        mask &= age < window
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, count, sinks)], dim=-1)
    weights = scores.softmax(-1)[..., :count]
    return torch.einsum("hst,thd->shd", weights, value)


@lru_cache(maxsize=256)
def reference(lengths, *, window, dtype=torch.float64, has_sink=False, heads=4, key_heads=2):
    """Output, and gradients of query, key, value and sink, in float64 of inputs in `dtype`."""
    leaves, grad = draw(lengths, dtype=dtype, has_sink=has_sink, heads=heads, key_heads=key_heads)
    wide = [x.double().requires_grad_() for x in leaves if x is not None]
    out = windowed_attention(*wide, *([] if has_sink else [None]), lengths, window=window)
    return [out.detach(), *torch.autograd.grad(out, wide, grad.double())]


def errors(ours, wanted):
    """Largest difference of each pair."""
    return [float((a.double() - b).abs().max()) for a, b in zip(ours, wanted, strict=True)]
