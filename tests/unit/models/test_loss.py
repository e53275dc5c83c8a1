"""Chunked, vocabulary-split cross entropy against torch's, in float64 and float32."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_v2pe.models.loss import HeadPorts, weighted_cross_entropy


def make(rows=13, hidden=8, vocab=11, padded=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=generator, dtype=dtype, requires_grad=True)
    w = torch.randn(padded, hidden, generator=generator, dtype=dtype, requires_grad=True)
    return h, w, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_plain_cross_entropy(chunk, dtype, tolerance):
    h, w, labels = make(dtype=dtype)
    scale = torch.linspace(0, 1, 13, dtype=dtype)
    total, losses = weighted_cross_entropy(
        h, w, labels, row_weights=scale, vocab_size=11, loss_chunk_tokens=chunk, ports=HeadPorts()
    )
    grads = torch.autograd.grad(3 * total, (h, w))
    plain = F.cross_entropy(h @ w[:11].t(), labels, reduction="none")
    wanted = torch.autograd.grad(3 * (plain * scale).sum(), (h, w))
    assert torch.allclose(losses, plain, atol=tolerance)
    assert torch.allclose(total, (plain * scale).sum(), atol=10 * tolerance)
    assert not losses.requires_grad
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.allclose(grad, want, atol=tolerance)
    assert (grads[1][11:] == 0).all()  # padding rows get no probability and no gradient


class ThreadedReduce:
    """All-reduce between threads of one process: a tensor parallel group without processes."""

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size), [None] * size

    def port(self, rank, combine):
        def reduce(x):
            self.slots[rank] = x
            self.barrier.wait()
            result = combine(torch.stack(self.slots))
            self.barrier.wait()
            return result

        return reduce


@pytest.mark.parametrize("size", [2, 4])  # with 4 ranks the last holds padding rows only
def test_split_vocabulary_equals_whole(size):
    h, w, labels = make(vocab=11, padded=16)
    plain = F.cross_entropy(h @ w[:11].t(), labels, reduction="none")
    weights = torch.linspace(0.5, 2, 13, dtype=torch.float64)
    wanted = torch.autograd.grad((plain * weights).sum(), (h, w))
    group, results = ThreadedReduce(size), [None] * size

    def run(rank):
        rows = 16 // size
        rows_of_rank = w.detach()[rank * rows : (rank + 1) * rows].requires_grad_()
        local = h.detach().clone().requires_grad_()
        ports = HeadPorts(
            vocab_start_index=rank * rows,
            reduce_max=group.port(rank, lambda x: x.amax(0)),
            reduce_sum=group.port(rank, lambda x: x.sum(0)),
        )
        total, losses = weighted_cross_entropy(
            local, rows_of_rank, labels, row_weights=weights, vocab_size=11, loss_chunk_tokens=5, ports=ports
        )
        results[rank] = (losses, *torch.autograd.grad(total, (local, rows_of_rank)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.allclose(result[0], plain, atol=1e-12) for result in results)
    assert torch.allclose(sum(result[1] for result in results), wanted[0], atol=1e-12)
    assert torch.allclose(torch.cat([result[2] for result in results]), wanted[1], atol=1e-12)


def test_no_supervised_rows():
    h, w, labels = make(rows=0)
    total, losses = weighted_cross_entropy(
        h, w, labels, row_weights=torch.zeros(0), vocab_size=11, loss_chunk_tokens=4, ports=HeadPorts()
    )
    grad_h, grad_w = torch.autograd.grad(total, (h, w))
    assert total == 0
    assert losses.shape == (0,)
    assert grad_h.shape == (0, 8)
    assert (grad_w == 0).all()


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor that an operation returns, views of the given ones aside."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.given:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("chunk", [16, 32])
def test_logits_never_exist_for_all_rows(chunk):
    """Forward and backward: no tensor is larger than a loss chunk's logits, or the head itself."""
    h, w, labels = make(rows=512, vocab=1000, padded=1024, dtype=torch.float32)
    with LargestTensor() as largest:
        total, _ = weighted_cross_entropy(
            h,
            w,
            labels,
            row_weights=torch.ones(512),
            vocab_size=1000,
            loss_chunk_tokens=chunk,
            ports=HeadPorts(),
        )
        total.backward()
    assert largest.elements == chunk * 1024  # padding columns are multiplied, too


class MatrixWidths(TorchDispatchMode):
    """Last dimensions of all factors and products of matrix multiplications."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.found |= {max(x.stride()) for x in (*args, result)}
        return result


def test_products_have_rows_of_the_padded_width():
    """A row of 92,553 bf16 numbers starts at an odd address, which tensor cores read slowly."""
    h, w, labels = make(rows=32, hidden=16, vocab=93, padded=128, dtype=torch.float32)
    with MatrixWidths() as widths:
        total, _ = weighted_cross_entropy(
            h, w, labels, row_weights=torch.ones(32), vocab_size=93, loss_chunk_tokens=16, ports=HeadPorts()
        )
        total.backward()
    assert widths.found == {16, 128}


@pytest.mark.parametrize("frozen", [0, 1])
def test_gradients_of_frozen_parts_are_not_formed(frozen):
    """A frozen head costs no head-sized buffer, and evaluation forms no gradients at all."""
    tensors = make(rows=4, vocab=100, padded=100)
    tensors[frozen].requires_grad_(False)
    arguments = dict(row_weights=torch.ones(4), vocab_size=100, loss_chunk_tokens=4, ports=HeadPorts())
    total, _ = weighted_cross_entropy(*tensors, **arguments)
    assert [saved is None for saved in total.grad_fn.saved_tensors] == [frozen == 0, frozen == 1]
    with torch.no_grad(), LargestTensor(*tensors) as largest:
        weighted_cross_entropy(*tensors, **arguments)
    assert largest.elements == 4 * 100  # its logits; the head has 100 x 8
