"""Whole tensors of a model that is spread over ranks: give each rank its slices, compare each rank's slices.

A rank's parameters are cut into slices by the sharded state that checkpoints are written with: every slice has the
name of its whole tensor and its place in it. Weights are set and results are compared slice by slice on every rank,
so nothing is gathered, copies on other ranks are compared too, and a wrong placement shows.

    whole {key: tensor} --place--> model --slices_of--> [(key, slices, local tensor)] --errors--> {key: error}
"""

import contextlib
import math
import zlib

import torch


def slices_of(model_chunks, ranks):
    """(key, slices of the whole tensor, its shape, local tensor) of everything this rank's model chunks hold."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    from megatron_v2pe.checkpoint.state.model_state import model_sharded_state_dict

    built, _, _ = load_preprocess(model_sharded_state_dict(model_chunks, ranks))  # gate and up become two
    found = []
    for shard in nested_values(built):
        if isinstance(shard, ShardedTensor):
            offsets, shape = shard.global_offset, shard.local_shape
            slices = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
            found.append((shard.key, slices, tuple(shard.global_shape), shard.data.detach()))
    return found


def draw(key, shape):
    """Weights of a parameter, from its name alone: norms and LayerScale near 1, all others small."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    is_scale = "norm.weight" in key or key.endswith((".ls1", ".ls2"))
    return torch.empty(shape).normal_(1.0 if is_scale else 0.0, 0.08, generator=generator)


def part_of(whole, slices):
    """A slice of a whole tensor; rows beyond its end (vocabulary padding of this layout) are zero."""
    found = whole[slices]
    wanted = slices[0].stop - slices[0].start
    if len(found) == wanted:
        return found
    return torch.cat([found, found.new_zeros(wanted - len(found), *found.shape[1:])])


def is_vocabulary(key):
    return key.endswith(("word_embeddings.weight", "output_layer.weight"))


def place(model_chunks, ranks, *, vocab_size):
    """Give every parameter its slice of the drawn weights; vocabulary padding is zero."""
    for key, slices, shape, local in slices_of(model_chunks, ranks):
        whole = draw(key, (vocab_size, *shape[1:]) if is_vocabulary(key) else shape)
        local.copy_(part_of(whole, slices))


@contextlib.contextmanager
def gradients_in_place(model_chunks):
    """Within the block parameters hold their gradients; zeros for those that are not trained."""
    kept = {}
    for model_chunk in model_chunks:
        for parameter in model_chunk.parameters():
            kept[parameter] = parameter.data
            gradient = getattr(parameter, "main_grad", None)
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.view_as(parameter)
    yield
    for parameter, data in kept.items():
        parameter.data = data


def gather_gradients(wrapped):
    """Make every rank's gradient buffers whole: the distributed optimizer leaves each its shard of the sum."""
    import torch.distributed as dist

    for wrapper in wrapped:
        for group in [*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups]:
            over = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(over.size())[over.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=over)


def whole_of(found, *, vocab_size):
    """Whole tensors from the slices of a single rank, vocabulary padding cut off."""
    wholes = {}
    for key, slices, shape, local in found:
        wholes.setdefault(key, torch.zeros(shape))[slices] = local
    return {key: whole[:vocab_size] if is_vocabulary(key) else whole for key, whole in wholes.items()}


def errors(found, wholes, *, scales):
    """Largest deviation of each key's slices, divided by the key's scale; absolute where the scale is 0."""
    worst = {}
    for key, slices, _shape, local in found:
        deviation = float((local - part_of(wholes[key], slices)).abs().max()) / (scales[key] or 1.0)
        worst[key] = max(worst.get(key, 0.0), deviation if math.isfinite(deviation) else math.inf)
    return worst


def largest(wholes):
    """Largest absolute value of each tensor."""
    return {key: float(whole.abs().max()) for key, whole in wholes.items()}
