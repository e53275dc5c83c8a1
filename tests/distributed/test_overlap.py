"""Gradients reduced while backward runs, weights gathered while forward runs: the same numbers, other calls.

Two data parallel ranks with different numbers of tiles, two micro batches, three steps. Sums of two gradients do not
depend on their order; but a rank updates other slices where there are several buckets, so that norms are added up in
another order (1e-7), and Adam's kernel rounds the ends of slices differently: two units in the last place of a weight
after three steps. mcore's buckets have 40 million gradients; here they are small.
"""

import pytest
import torch

from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.models.language import LanguageModel
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
BUCKET = 60_000
OVERLAPS = {
    "plain": {},
    "reduce": dict(overlap_grad_reduce=True),
    "reduce, gather": dict(overlap_grad_reduce=True, overlap_param_gather=True),
}


def noted(calls, name, original):
    """The function, which notes when it begins, and backward also when it ends."""

    def wrapped(*args, **kwargs):
        calls.append(name)
        result = original(*args, **kwargs)
        calls.append(f"{name} done")
        return result

    return wrapped


def train(rank, size, overlap):
    """Loss and norm of three steps, this rank's weights after them, and calls in their order."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from megatron_v2pe.assembly.optim.fused_adam import install_fused_adam
    from megatron_v2pe.assembly.optim.optimizer import build_trainer
    from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes
    from megatron_v2pe.train.step import train_step

    make, calls = DistributedDataParallelConfig.__init__, []

    def with_small_buckets(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.bucket_size = BUCKET

    DistributedDataParallelConfig.__init__ = with_small_buckets
    for name in ("start_grad_sync", "start_param_sync"):
        original = getattr(_ParamAndGradBucketGroup, name)
        setattr(_ParamAndGradBucketGroup, name, noted(calls, name, original))
    torch.autograd.backward = noted(calls, "backward", torch.autograd.backward)
    LanguageModel.forward = noted(calls, "forward", LanguageModel.forward)
    install_fused_adam()
    config = RunConfig(parallel=ParallelConfig(**overlap), runtime=RuntimeConfig(dtype="float32"))
    sizes = StepSizes(
        tokens=96, tiles=1 + rank, hidden=64, layers=3, vocab=300, vision_hidden=32, vision_layers=2
    )
    step = MeasuredStep(config=config, sizes=sizes, dp=size)
    (wrapped,) = step.wrapped
    trainer = build_trainer([wrapped.module], step.wrapped, config)
    numbers = []
    for _ in range(3):
        calls.clear()
        report = train_step(trainer, step.runner, [step.batch, step.batch], ranks=step.ranks)
        numbers.append((report.loss, report.grad_norm))
    last = list(calls)
    wrapped.start_param_sync(force_sync=True)  # owed to a forward pass that does not come
    weights = torch.cat([parameter.detach().flatten() for parameter in wrapped.module.parameters()])
    return dict(numbers=numbers, weights=weights, calls=last, buckets=len(wrapped.bucket_groups))


def inside(calls, what, name):
    """Whether calls of `name` begin while the last `what` of the step runs."""
    begin = len(calls) - 1 - calls[::-1].index(what)
    return name in calls[begin : calls.index(f"{what} done", begin)]


@pytest.fixture(scope="module")
def plain():
    return run_ranks(train, 2, {})


@pytest.mark.parametrize("overlap", ["reduce", "reduce, gather"])
def test_the_same_bits_and_calls_inside_the_passes(plain, overlap):
    found = run_ranks(train, 2, OVERLAPS[overlap])
    for mine, other in zip(found, plain, strict=True):
        assert mine["buckets"] > 3
        torch.testing.assert_close(mine["numbers"], other["numbers"], rtol=1e-7, atol=0)
        torch.testing.assert_close(mine["weights"], other["weights"], rtol=2.4e-7, atol=1e-10)
        assert inside(mine["calls"], "backward", "start_grad_sync")
        assert not inside(other["calls"], "backward", "start_grad_sync")
        first = mine["calls"].index("backward")
        assert ("start_param_sync" in mine["calls"][:first]) == ("gather" in overlap)
        assert ("start_param_sync" in mine["calls"][first:]) == ("gather" not in overlap)
