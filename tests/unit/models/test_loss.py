"""Chunked, vocabulary-split cross entropy against torch's, in float64 and float32."""

import threading

import pytest
import torch
import torch.nn.functional as F

from megatron_v2pe.models.loss import HeadPorts, cross_entropy


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
    loss = cross_entropy(h, w, labels, vocab_size=11, chunk=chunk, ports=HeadPorts())
    grads = torch.autograd.grad((loss * scale).sum(), (h, w))
    plain = F.cross_entropy(h @ w[:11].t(), labels, reduction="none")
    wanted = torch.autograd.grad((plain * scale).sum(), (h, w))
    assert torch.allclose(loss, plain, atol=tolerance)
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
    wanted = torch.autograd.grad(plain.sum(), (h, w))
    group, results = ThreadedReduce(size), [None] * size

    def run(rank):
        rows = 16 // size
        part = w.detach()[rank * rows : (rank + 1) * rows].requires_grad_()
        local = h.detach().clone().requires_grad_()
        ports = HeadPorts(
            first_word=rank * rows,
            reduce_max=group.port(rank, lambda x: x.amax(0)),
            reduce_sum=group.port(rank, lambda x: x.sum(0)),
        )
        loss = cross_entropy(local, part, labels, vocab_size=11, chunk=5, ports=ports)
        results[rank] = (loss.detach(), *torch.autograd.grad(loss.sum(), (local, part)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.allclose(result[0], plain, atol=1e-12) for result in results)
    assert torch.allclose(sum(result[1] for result in results), wanted[0], atol=1e-12)
    assert torch.allclose(torch.cat([result[2] for result in results]), wanted[1], atol=1e-12)


def test_no_supervised_rows():
    h, w, _ = make(rows=0)
    loss = cross_entropy(h, w, torch.zeros(0, dtype=torch.int64), vocab_size=11, chunk=4, ports=HeadPorts())
    grad_h, grad_w = torch.autograd.grad(loss.sum(), (h, w))
    assert loss.shape == (0,)
    assert grad_h.shape == (0, 8)
    assert (grad_w == 0).all()


def test_logits_never_exist_for_all_rows():
    """The largest tensor that autograd keeps is far below rows x vocabulary."""
    h, w, labels = make(rows=512, vocab=1000, padded=1024, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        cross_entropy(h, w, labels, vocab_size=1000, chunk=16, ports=HeadPorts())
    assert max(saved) <= 1024 * 8
