"""What the ranks of the GPU tests do: the bodies of `tests/te` and `tests/distributed` on real kernels and NCCL.

Every function runs in a process of its own, after `start`. Errors are computed on the CPU in float64.
"""

import os

import torch

from tests.distributed.test_context_attention import inputs, reference
from tests.distributed.test_window_ranks import attend_and_return
from tests.te import bodies as te_bodies

TE, NATIVE = "transformer_engine", "native"


def start(rank, world_size, port):
    """Leave the gloo group that started this process, as a rank that torchrun started; NCCL comes next.

    Where NCCL may put several ranks on one GPU (NCCL_MULTI_RANK_GPU_ENABLE=1, NCCL 2.30 or newer), all share the first.
    """
    import torch.distributed as dist

    dist.destroy_process_group()
    one_gpu = torch.cuda.device_count() < world_size
    numbers = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=0 if one_gpu else rank, MASTER_PORT=port)
    os.environ.update(MASTER_ADDR="127.0.0.1", **{name: str(number) for name, number in numbers.items()})


def te_attention(rank, world_size, port, cases):
    """Errors of output, dq, dk, dv of the adapter around Transformer Engine, by (documents, cp_comm_type)."""
    start(rank, world_size, port)
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed

    context = init_distributed(ParallelPlan(cp=world_size), seed=0)
    return [
        te_bodies.adapter_errors(context, documents, comm, False, torch.bfloat16) for documents, comm in cases
    ]


def native_attention(rank, world_size, port, cases):
    """Largest errors of output, dq, dk, dv of this rank's shard, by (cp_comm_type, lengths, heads, KV heads, dtype).

    Relative to a tensor's largest entry where that is above 1: gradients of a key that a thousand queries see are.
    """
    start(rank, world_size, port)
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed

    ranks = init_distributed(ParallelPlan(cp=world_size), seed=0).ranks
    return [native_errors(rank, world_size, ranks, *case) for case in cases]


def native_errors(rank, world_size, ranks, comm, lengths, heads, key_heads, dtype):
    import numpy as np

    from megatron_v2pe.parallel.attention.context_parallel import context_parallel_attention
    from megatron_v2pe.parallel.zigzag import shard_indices

    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = torch.from_numpy(shard_indices(boundaries, cp=world_size, cp_rank=rank))
    local = [x[index].to(ranks.device) for x in inputs(lengths, heads, key_heads, dtype)]
    leaves = [x.requires_grad_() for x in local[:3]]
    out = context_parallel_attention(comm)(
        *leaves,
        lengths=[length // world_size for length in lengths],
        scale=leaves[0].shape[-1] ** -0.5,
        group=ranks.groups.cp if world_size > 1 else None,
    )
    ours = [out.detach(), *torch.autograd.grad(out, leaves, local[3])]
    wanted = reference(lengths, heads, key_heads, dtype)
    return [
        float((mine.cpu().double() - full[index]).abs().max() / full.abs().max().clamp_min(1.0))
        for mine, full in zip(ours, wanted, strict=True)
    ]


def windows_and_sinks(rank, world_size, port, cases):
    """Errors of output, dq, dk, dv of this rank's shard and of the sink's summed gradient, by case."""
    start(rank, world_size, port)
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed

    ranks = init_distributed(ParallelPlan(cp=world_size), seed=0).ranks
    return attend_and_return(rank, world_size, cases, device=ranks.device)


def models(rank, world_size, port, layouts):
    """Distances of one micro batch's loss and gradients from the native float32 model's, by layout and model."""
    start(rank, world_size, port)
    return [distances(world_size, layout) for layout in layouts]


def distances(world_size, layout):
    from megatron.core import parallel_state

    from megatron_v2pe.config.schema import ParallelConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    plan = resolve(ParallelConfig(**layout), world_size)
    context = init_distributed(plan, seed=0)
    exact = result(NATIVE, layout, context, "float32")
    return {
        backend: distance(result(backend, layout, context, "bfloat16"), exact) for backend in (TE, NATIVE)
    }


def result(backend, layout, context, dtype):
    """Loss, and gradients in float64 by parameter name."""
    model = te_bodies.build(backend, layout, context, dtype)
    te_bodies.fill(model)
    loss = te_bodies.run(model, context, getattr(torch, dtype))
    return loss, {name: x.grad.double() for name, x in model.named_parameters()}


def distance(found, exact):
    """Relative error of the loss, and of all gradients as one vector."""
    (loss, gradients), (exact_loss, exact_gradients) = found, exact
    assert gradients.keys() == exact_gradients.keys(), "a checkpoint would not fit both"
    off = sum(float((gradients[name] - x).square().sum()) for name, x in exact_gradients.items())
    size = sum(float(x.square().sum()) for x in exact_gradients.values())
    return abs(loss - exact_loss) / abs(exact_loss), (off / size) ** 0.5
