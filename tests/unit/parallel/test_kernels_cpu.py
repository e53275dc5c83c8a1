"""The CPU's attention of blocks: against scores written out in float64, and how many of them are computed."""

import pytest
import torch

from megatron_v2pe.parallel.attention import kernels_cpu
from megatron_v2pe.parallel.attention.kernels_cpu import LEAST, PIECE, cpu_backward, cpu_forward

HEADS, DIM = 4, 8
# Rounding of float64; of float32 by the length of the sums.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def dense(q, k, v, *, blocks, causal, scale):
    """Output and log-sum-exp of [n*s, h, d] with all scores of each block."""
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = (
        x.unflatten(0, (blocks, -1)).transpose(1, 2)  # [n, h, s, d]
        for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
    )
    scores = scale * queries @ keys.transpose(2, 3)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    out, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
    return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("length", "blocks", "key_heads"),
    [
        (1, 1, 4),
        (LEAST - 1, 1, 2),
        (LEAST, 1, 4),
        (4 * PIECE, 2, 2),
        (4 * PIECE + 1, 2, 2),  # filled up
        (8 * PIECE + 37, 1, 1),
        (9 * PIECE - 1, 1, 2),
    ],
)
def test_causal_blocks_are_those_of_all_scores(dtype, length, blocks, key_heads):
    torch.manual_seed(length)
    q, grad = (torch.randn(blocks * length, HEADS, DIM, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(blocks * length, key_heads, DIM, dtype=dtype) for _ in range(2))
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = dense(*inputs, blocks=blocks, causal=True, scale=0.5)
    wanted_gradients = torch.autograd.grad(wanted, inputs, grad.double())
    options = dict(blocks=blocks, causal=True, scale=0.5)
    out, lse = cpu_forward(q, k, v, **options)
    gradients = cpu_backward(grad, q, k, v, out, lse, **options)
    assert out.shape == q.shape
    for found, exact in zip((out, lse, *gradients), (wanted, wanted_lse, *wanted_gradients), strict=True):
        torch.testing.assert_close(found.double(), exact.detach(), rtol=0, atol=TOLERANCE[dtype])


def test_queries_and_keys_of_other_blocks():
    q, k, v = torch.randn(10, HEADS, DIM), torch.randn(6, 2, DIM), torch.randn(6, 2, DIM)
    options = dict(blocks=2, causal=False, scale=1.0)
    out, lse = cpu_forward(q, k, v, **options)
    wanted, wanted_lse = dense(q, k, v, **options)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize(("pieces", "share"), [(2, 3 / 4), (4, 5 / 8), (16, 17 / 32)])
def test_the_masked_half_is_left_out(monkeypatch, pieces, share):
    """Scores that the kernel is given, of all that a block has."""
    given = []
    kernel = kernels_cpu.torch_operator

    def counting(name):
        def run(*args, **kwargs):
            q, k = args[1:3] if name.endswith("backward") else args[:2]
            given.append(q.shape[0] * q.shape[2] * k.shape[2])
            return kernel(name)(*args, **kwargs)

        return run

    monkeypatch.setattr(kernels_cpu, "torch_operator", counting)
    monkeypatch.setattr(kernels_cpu, "LEAST", 2 * PIECE)
    length = pieces * PIECE
    q, k, v = (torch.randn(length, 1, 8) for _ in range(3))
    out, lse = cpu_forward(q, k, v, blocks=1, causal=True, scale=1.0)
    cpu_backward(out, q, k, v, out, lse, blocks=1, causal=True, scale=1.0)
    assert sum(given) == 2 * share * length**2
