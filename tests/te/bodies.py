"""What the ranks of the tests do; every function runs in processes of its own, after `engine.start`."""

import types

import numpy as np
import torch

from tests.te import engine, kernels

HEADS, KEY_HEADS, DIM = 4, 2, 16
TILE_SIZE = 56  # 4 x 4 patches, 4 visual tokens, as in tests.support.packs
DOCUMENTS = [[3, "2@1", 9], [20, "1@3"], [33]]


def attention_cases(rank, world_size, folder, cases):
    """Errors of output, dq, dk, dv of this rank's shard, relative to each one's size, by case; and `refusals`."""
    engine.start(folder, kernels.references())
    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed

    context = init_distributed(ParallelPlan(cp=world_size), seed=0)
    return [adapter_errors(context, *case) for case in cases], refusals(context)


def refusals(context):
    """What Transformer Engine says to packed sequences in the ways that `config.validate` refuses."""
    import torch.distributed as dist
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    said = {}
    try:
        adapter_errors(context, [[8]], "all_gather", False)
    except (AssertionError, ValueError) as error:
        said["all_gather"] = str(error)
    q, boundaries = torch.zeros(4, HEADS, DIM), torch.tensor([0, 8], dtype=torch.int32)
    arguments = dict(cp_group=[dist.group.WORLD] * 2, cp_global_ranks=[0, 1], cp_stream=None)
    shape = (boundaries, boundaries, 8, 8, boundaries, boundaries, 0.0)
    try:
        context_parallel.attn_forward_func_with_cp(
            True, q, q, q, *shape, **arguments, cp_comm_type="a2a+p2p", qkv_format="thd"
        )
    except AssertionError as error:
        said["a2a+p2p"] = str(error)
    return said


def adapter_errors(context, documents, comm, real_boundaries, dtype=torch.float32):
    """Our adapter on our shard, against full attention of the whole pack.

    Args:
        context: this rank, context parallel only.
        documents: as in `tests.support.packs`.
        comm: cp_comm_type.
        real_boundaries: give Transformer Engine the real ends of documents, as mcore would.
        dtype: of queries, keys and values.
    """
    from megatron_v2pe.models.language import LanguageModel
    from megatron_v2pe.models.layers.elementwise import ElementwiseOps
    from megatron_v2pe.parallel.attention import te
    from megatron_v2pe.parallel.batch_sharder import BatchSharder
    from megatron_v2pe.parallel.zigzag import shard_indices
    from tests.support.packs import batch_of, layout_of

    plan, ranks = context.plan, context.ranks
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple)
    sharder = BatchSharder(context=context, dtype=dtype)
    local = sharder.shard(batch_of(layout, tile_range=(0, 0)), encodes_tiles=False)
    params = LanguageModel.attention_params(
        types.SimpleNamespace(rope=rope(), elementwise=ElementwiseOps(), routed_rows=lambda batch: None),
        local,
    )
    if real_boundaries:
        real = [0, *np.cumsum([document.num_tokens for document in layout.documents])]
        boundaries = torch.tensor(real, dtype=torch.int32, device=ranks.device)
        params.cu_seqlens_q = params.cu_seqlens_kv = boundaries
    core = te.RotaryTEAttention(**core_arguments(context, comm))
    kept = te.padding_counts_as_tokens
    if real_boundaries:
        te.padding_counts_as_tokens = plain_parameters
    wanted = full_attention(layout, dtype)
    index = torch.from_numpy(shard_indices(layout.cu_seqlens, cp=plan.cp, cp_rank=ranks.cp_rank))
    *leaves, grad = (x[index].to(ranks.device) for x in inputs(layout, dtype))
    leaves = [x.requires_grad_() for x in leaves]
    out = core(*leaves, None, core_mask(), packed_seq_params=params)
    out.backward(grad.flatten(1))
    te.padding_counts_as_tokens = kept
    ours = [x.cpu() for x in (out.detach().unflatten(1, (HEADS, DIM)), *(leaf.grad for leaf in leaves))]
    mask = is_real(layout)[index]
    return [
        float((mine.double() - full[index])[mask].norm() / full[index][mask].norm())
        for mine, full in zip(ours, wanted, strict=True)
    ]


def plain_parameters(params):
    """What mcore's own packed parameters would be: real boundaries beside the padded ones."""
    from megatron.core.packed_seq_params import PackedSeqParams

    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    fields = {name: getattr(params, name) for name in (*names, "max_seqlen_q", "max_seqlen_kv")}
    return PackedSeqParams(qkv_format="thd", **fields)


def core_mask():
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType.causal


def core_arguments(context, comm):
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=KEY_HEADS,
        attention_dropout=0.0,
        context_parallel_size=context.plan.cp,
    )
    return dict(
        config=config,
        layer_number=1,
        attn_mask_type=core_mask(),
        attention_type="self",
        cp_comm_type=comm,
        pg_collection=context.ranks.groups,
    )


def rope():
    from megatron_v2pe.v2pe.rope import RopeSpec
    from tests.support.packs import TOKENS_PER_TILE

    return RopeSpec(dim=DIM, base=1e4, tokens_per_tile=TOKENS_PER_TILE, fractional=True)


def is_real(layout):
    """bool [t]: not padding."""
    found = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for start, document in zip(layout.cu_seqlens, layout.documents, strict=False):
        found[start : start + document.num_tokens] = True
    return found


def inputs(layout, dtype):
    """Queries, keys, values and output gradient of the pack; padding has no gradient, for it has no loss."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    found = [torch.randn(layout.num_tokens, count, DIM, generator=generator) for count in heads]
    found[3][~is_real(layout)] = 0.0
    return [x.to(dtype) for x in found]


def full_attention(layout, dtype):
    """Output and gradients of the whole pack in float64: documents masked, tokens rotated by their positions."""
    from megatron_v2pe.v2pe.rope import apply_rotary, rope_angles
    from tests.support.packs import units_of

    angles = rope_angles(torch.from_numpy(units_of(layout)), rope(), rope_length=layout.rope_length)
    query, key, value, grad = (x.double() for x in inputs(layout, dtype))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    document = torch.from_numpy(np.repeat(np.arange(len(layout.documents)), np.diff(layout.cu_seqlens)))
    seen = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    q, k = (apply_rotary(x, angles).unflatten(1, (KEY_HEADS, -1)) for x in leaves[:2])
    found = torch.einsum("skgd,tkd->kgst", q, k.squeeze(2)) * DIM**-0.5
    weights = found.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("kgst,tkd->skgd", weights, leaves[2]).flatten(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def architecture():
    from megatron_v2pe.config.arch.architecture import parse_architecture

    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        patch_size=14,
        image_size=TILE_SIZE,
        norm_type="layer_norm",
        qkv_bias=True,
        qk_normalization=False,
    )
    language = dict(
        architectures=["InternLM2ForCausalLM"],
        hidden_size=HEADS * DIM,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=96,
        vocab_size=1200,
        rope_scaling=None,
    )
    sizes = dict(model_type="internvl_chat", force_image_size=TILE_SIZE)
    return parse_architecture(dict(**sizes, vision_config=vision, llm_config=language))


def model_cases(rank, world_size, folder, layouts):
    """What a model of Transformer Engine's layers has and computes, beside the native one; by layout.

    Args:
        rank: this rank.
        world_size: number of ranks.
        folder: Transformer Engine's sources.
        layouts: name -> fields of ParallelConfig.
    """
    engine.start(folder, kernels.references())
    from megatron_v2pe.assembly import backend_modules as choice

    choice.torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    return {name: compare_models(world_size, layout) for name, layout in layouts.items()}


def compare_models(world_size, layout):
    from megatron.core import parallel_state

    from megatron_v2pe.config.schema import ParallelConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    plan = resolve(ParallelConfig(**layout), world_size)
    context = init_distributed(plan, seed=0)
    models = {name: build(name, layout, context, "float32") for name in ("transformer_engine", "native")}
    theirs, ours = models.values()
    shapes = [{name: tuple(x.shape) for name, x in model.named_parameters()} for model in models.values()]
    for model in (ours, theirs):
        fill(model)
    kernels.compiled().calls.clear()
    losses = [run(model, context, torch.float32) for model in models.values()]
    wanted = dict(ours.named_parameters())
    errors = {
        name: float((x.grad - wanted[name].grad).abs().max() / wanted[name].grad.abs().max().clamp_min(1e-6))
        for name, x in theirs.named_parameters()
    }
    return dict(
        shapes=shapes,
        modules=sorted({type(module).__name__ for module in theirs.modules()}),
        losses=losses,
        gradients=errors,
        calls=sorted(set(kernels.compiled().calls)),
    )


def fill(model):
    """The same random weights for every model of these sizes, whatever its layers, dtype and device."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        mean = 1.0 if "norm.weight" in name else 0.0
        parameter.data.copy_(torch.empty(parameter.shape).normal_(mean, 0.08, generator=generator))


def build(backend, layout, context, dtype):
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.config.schema import ParallelConfig, PositionConfig, RunConfig, RuntimeConfig

    config = RunConfig(
        parallel=ParallelConfig(**layout, attention_backend=backend),
        position=PositionConfig(mode="v2pe_random"),
        runtime=RuntimeConfig(dtype=dtype),
    )
    (model,) = build_model(config, architecture(), context)
    return model


def run(model, context, dtype):
    """Loss of one micro batch; gradients are left in the parameters."""
    from megatron_v2pe.batch.packed_batch import tile_share
    from megatron_v2pe.batch.pixel_norm import PixelNorm
    from megatron_v2pe.parallel.batch_sharder import BatchSharder
    from tests.support.packs import batch_of, layout_of

    plan, ranks = context.plan, context.ranks
    layout = layout_of(DOCUMENTS, pad_to_multiple=plan.pad_to_multiple)
    tiles = tile_share(layout.num_tiles, plan.tile_ranks, ranks.tile_rank)
    norm = PixelNorm((0.0,) * 3, (1.0,) * 3)
    sharder = BatchSharder(context=context, dtype=dtype, norm=norm)
    local = sharder.shard(batch_of(layout, tile_range=tiles, tile_size=TILE_SIZE))
    total, _ = model(local)
    total.backward()
    return float(total.detach())


def train_without_a_gpu(rank, world_size, folder, config, overrides):
    """Module of the Adam that mcore chose, and of the one it used in a run; Transformer Engine sees no device."""
    engine._give_a_device = lambda torch: None
    engine.start(folder, kernels.references())
    import megatron.core.optimizer as optimizer

    from megatron_v2pe.config.load import load_run_config
    from megatron_v2pe.preflight.disk import run_sizes
    from megatron_v2pe.train.loop import train
    from megatron_v2pe.train.setup import Outside

    chosen = optimizer.Adam.__module__
    train(load_run_config(str(config), overrides), Outside(sizes_of=run_sizes))
    return chosen, optimizer.Adam.__module__
