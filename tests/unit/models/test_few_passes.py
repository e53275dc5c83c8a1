"""RMSNorm, SwiGLU and embedding with a backward pass of their own, against torch's operations one by one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_v2pe.models.layers.elementwise import mlp_with_swiglu
from megatron_v2pe.models.layers.linears import LARGE, look_up
from megatron_v2pe.models.layers.norms import Norm

# Sums over 40 rows and 24 channels in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
DTYPES = sorted(TOLERANCE, key=str)


def leaves(*shapes, dtype):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def norm_of(weight):
    norm = Norm(
        SimpleNamespace(normalization="RMSNorm", params_dtype=weight.dtype, sequence_parallel=False), 24
    )
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torchs_to_the_bit_and_its_gradients_by_rounding(dtype):
    x, weight, grad = leaves((20, 2, 24), 24, (20, 2, 24), dtype=dtype)
    wanted = F.rms_norm(x, (24,), None, 1e-5) * weight
    norm = norm_of(weight)
    found = norm(x)
    assert torch.equal(found, wanted)
    wanted_gradients = torch.autograd.grad(wanted, (x, weight), grad)
    for each, exact in zip(torch.autograd.grad(found, (x, norm.weight), grad), wanted_gradients, strict=True):
        torch.testing.assert_close(each, exact, rtol=0, atol=TOLERANCE[dtype] * float(exact.abs().max()))


def test_rms_norm_of_a_frozen_weight_and_of_an_input_without_gradient():
    x, weight = leaves((5, 1, 24), 24, dtype=torch.float32)
    frozen = norm_of(weight).requires_grad_(False)
    frozen(x).sum().backward()
    assert x.grad is not None
    trained = norm_of(weight)
    trained(x.detach()).sum().backward()
    assert trained.weight.grad is not None


def test_rms_norm_in_half_precision_weighs_after_rounding():
    x, weight = (each.detach() for each in leaves((9, 1, 24), 24, dtype=torch.bfloat16))
    assert torch.equal(
        norm_of(weight)(x), F.rms_norm(x.float(), (24,), None, 1e-5).to(torch.bfloat16) * weight
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_swiglu_is_torchs_to_the_bit(dtype, bias):
    x, fc1, fc2, offset = leaves((6, 1, 8), (20, 8), (8, 10), 20, dtype=dtype)
    offset = offset if bias else None

    def first(rows):
        return F.linear(rows, fc1), offset

    mlp = SimpleNamespace(linear_fc1=first, linear_fc2=lambda rows: (F.linear(rows, fc2), None))
    found, _ = mlp_with_swiglu(mlp, x)
    inner = F.linear(x, fc1)
    gate, up = (inner if offset is None else inner + offset).chunk(2, -1)
    wanted = F.linear(F.silu(gate) * up, fc2)
    assert torch.equal(found, wanted)
    inputs = [each for each in (x, fc1, fc2, offset) if each is not None]
    for each, exact in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs), strict=True
    ):
        assert torch.equal(each, exact)


@pytest.mark.parametrize("with_buffer", [True, False])
def test_rows_of_an_embeddings_gradient_are_added_where_they_belong(with_buffer):
    weight = torch.nn.Parameter(torch.randn(512, LARGE // 512))
    table = SimpleNamespace(weight=weight, tp_group=SimpleNamespace(size=lambda: 1))
    wanted = torch.zeros_like(weight)
    if with_buffer:
        weight.main_grad = torch.zeros_like(weight)
    for tokens in (torch.tensor([[3, 500, 3, 7]]), torch.tensor([[3, 0]])):  # two micro batches
        rows = look_up(table, tokens, forward=lambda tokens: F.embedding(tokens, weight))
        assert torch.equal(rows, weight[tokens])
        grad = torch.randn_like(rows)
        rows.backward(grad)
        wanted.index_add_(0, tokens[0], grad[0])
    if with_buffer:
        assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad if with_buffer else weight.grad, wanted)
