"""Our linears where they are whole: outputs and gradients are mcore's, and large weights are added to in place.

float32. The first micro batch of a step is mcore's to the bit, forward and backward; in the second the product adds to
what is there instead of being added to it: 1e-6 of the largest entry.
"""

import torch

from megatron_v2pe.models.layers import linears
from tests.support.spawn import run_ranks


def passes(rank, size, large):
    """Loss and every gradient of two micro batches, ours and mcore's; how often a product added in place."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
    from megatron_v2pe.models.layers import linears
    from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes

    linears.LARGE = large
    added = []
    backward = linears._AddedInPlace.backward

    def counted(ctx, *grads):
        added.append(ctx.saved_tensors[1].shape)
        return backward(ctx, *grads)

    linears._AddedInPlace.backward = staticmethod(counted)
    sizes = StepSizes(tokens=80, tiles=2, hidden=64, layers=2, vocab=100, vision_hidden=32, vision_layers=1)
    step = MeasuredStep(config=RunConfig(runtime=RuntimeConfig(dtype="float32")), sizes=sizes)
    found = []
    for is_ours in (True, False):
        if not is_ours:
            linears.ColumnLinear.forward = ColumnParallelLinear.forward
            linears.RowLinear.forward = RowParallelLinear.forward
        step.wrapped[0].zero_grad_buffer()
        rows = []
        for _ in range(2):
            step.runner.reset()
            total, _ = step.wrapped[0](step.runner.shard(step.batch))
            total.backward()
            gradients = [parameter.main_grad.clone() for parameter in step.wrapped[0].module.parameters()]
            rows.append([total.detach(), *gradients])
        found.append(rows)
    return found, len(added)


def test_mcores_linears_and_ours_agree():
    for large, in_place in ((2**40, False), (0, True)):
        ((ours, theirs), added) = run_ranks(passes, 1, large)[0]
        assert (added > 0) == in_place
        for mine, other in zip(ours[0], theirs[0], strict=True):
            assert torch.equal(mine, other)
        for mine, other in zip(ours[1], theirs[1], strict=True):
            assert (mine - other).abs().max() <= 1e-6 * other.abs().max()


def test_a_split_linear_is_mcores():
    class Group:
        def size(self):
            return 2

    class Linear:
        tp_group = Group()
        sequence_parallel = explicit_expert_comm = False

    assert not linears.is_whole(Linear)
