"""What the ranks of `test_fp8` do; every function runs in processes of its own, after `engine.start`."""

import dataclasses
import types

import torch

from tests.te import bodies, engine, fp8_kernels, kernels

FORMATS = {"current": (torch.float8_e4m3fn, torch.float8_e5m2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model of Transformer Engine's layers.

    Attributes:
        layout: fields of ParallelConfig.
        model: fields of ModelConfig.
        wide: channels in whole blocks of 128.
        bias: queries, keys and values have a bias.
        lora: fields of LoRAConfig.
        pads_as: recipe for whose products the pack is padded, where the model has none.
    """

    layout: dict = dataclasses.field(default_factory=dict)
    model: dict = dataclasses.field(default_factory=dict)
    wide: bool = False
    bias: bool = False
    lora: dict = dataclasses.field(default_factory=dict)
    pads_as: str = "current"


def start(folder):
    engine.start(folder, fp8_kernels.references())
    from megatron_v2pe.assembly import backend_modules as choice

    choice.torch = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))


def measured(rank, world_size, folder, cases):
    """Loss, gradients and kinds of products of each case: name -> Case; one micro batch."""
    start(folder)
    return {name: one_step(world_size, case) for name, case in cases.items()}


def on_one_rank(rank, world_size, folder, cases):
    """`measured`, `formula` and `after_an_update` in one process, most of whose time is its start."""
    found = measured(rank, world_size, folder, cases)
    return found, formula(world_size), after_an_update(world_size)


def one_step(world_size, case, prepare=lambda model: None):
    model, context, config = made(world_size, case)
    prepare(model)
    kernels.compiled().__dict__["products"] = products = []
    loss = run(model, context, config, case)
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return dict(loss=loss, gradients=gradients, products=(products.count("fp8"), products.count("plain")))


def made(world_size, case, backend="transformer_engine"):
    from megatron.core import parallel_state

    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.config.schema import (
        LoRAConfig,
        ModelConfig,
        ParallelConfig,
        PositionConfig,
        RunConfig,
        RuntimeConfig,
    )
    from megatron_v2pe.parallel.topology import init_distributed, resolve

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel = ParallelConfig(**case.layout, attention_backend=backend)
    context = init_distributed(resolve(parallel, world_size), seed=0)
    config = RunConfig(
        model=ModelConfig(**case.model),
        parallel=parallel,
        position=PositionConfig(mode="v2pe_random"),
        runtime=RuntimeConfig(dtype="float32"),
        lora=LoRAConfig(**case.lora),
    )
    (model,) = build_model(config, architecture(case), context)
    bodies.fill(model)
    for name, parameter in model.named_parameters():
        if case.wide and name.endswith(".weight") and ".linear_" in name:
            parameter.data.mul_(0.5)  # or its attention is all on one token, and amplifies what is rounded
    return model.train(), context, config


def architecture(case):
    found = bodies.architecture()
    language = found.language
    if case.wide:
        language = dataclasses.replace(language, hidden_size=256, head_dim=64, ffn_size=384)
    if case.bias:
        language = dataclasses.replace(language, qkv_bias=True)
    return dataclasses.replace(found, language=language)


def local_batch(context, config, case):
    from megatron_v2pe.batch.packed_batch import tile_share
    from megatron_v2pe.batch.pixel_norm import PixelNorm
    from megatron_v2pe.config.fp8 import pack_multiple
    from megatron_v2pe.parallel.batch_sharder import BatchSharder
    from tests.support.packs import batch_of, layout_of

    plan, ranks = context.plan, context.ranks
    if config.model.fp8 == "none":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, fp8=case.pads_as))
    documents = bodies.DOCUMENTS
    layout = layout_of(documents, pad_to_multiple=plan.pad_to_multiple, pack_multiple=pack_multiple(config))
    tiles = tile_share(layout.num_tiles, plan.tile_ranks, ranks.tile_rank)
    norm = PixelNorm((0.0,) * 3, (1.0,) * 3)
    sharder = BatchSharder(context=context, dtype=torch.float32, norm=norm)
    return sharder.shard(batch_of(layout, tile_range=tiles, tile_size=bodies.TILE_SIZE))


def run(model, context, config, case):
    total, _ = model(local_batch(context, config, case))
    total.backward()
    return float(total.detach())


def formula(world_size):
    """The model in FP8, and the native one whose decoder's linears round by the formula of current scaling."""
    case = Case(model={"fp8": "current"})
    ours = one_step(world_size, case)
    native, context, config = made(world_size, Case(), backend="native")
    round_linears(native.language.decoder)
    loss = run(native, context, config, Case())
    gradients = {name: x.grad for name, x in native.named_parameters() if x.grad is not None}
    return ours, dict(loss=loss, gradients=gradients)


class Rounded(torch.autograd.Function):
    """x W^T of numbers that 8 bits hold; gradients have more exponent."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = (in_eight_bits(each, torch.float8_e4m3fn) for each in (x, weight))
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = in_eight_bits(gradient, torch.float8_e5m2)
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def in_eight_bits(x, dtype):
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float() / scale


def round_linears(part):
    from megatron_v2pe.models.layers.linears import ColumnLinear, RowLinear

    linears = [module for module in part.modules() if isinstance(module, (ColumnLinear, RowLinear))]
    for linear in linears:
        linear.forward = lambda x, weight=linear.weight: (Rounded.apply(x, weight), None)
    assert len(linears) == 8  # four in each of two layers


def after_an_update(world_size):
    """Losses of changed weights: by mcore's schedule, by a direct call, and of a model that never had others.

    Transformer Engine keeps the FP8 copies of weights over the micro batches of a step.
    """
    from megatron_v2pe.assembly.schedule import run_schedule

    case = Case(model={"fp8": "current"})
    model, context, config = made(world_size, case)
    batch = local_batch(context, config, case)

    def forward_step(batches, model):
        total, _ = model(next(batches))
        return total, lambda output: (
            output,
            torch.ones((), dtype=torch.int),
            {"loss": float(output.detach())},
        )

    def step(model):
        return [each["loss"] for each in run_schedule([model], forward_step, [batch, batch])]

    def change(model):
        for name, parameter in model.named_parameters():
            if ".linear_" in name:
                parameter.data.mul_(1.5)

    before = step(model)
    change(model)
    stale = float(model(batch)[0].detach())
    after = step(model)
    fresh, _, _ = made(world_size, case)
    change(fresh)
    return dict(before=before, stale=stale, after=after, fresh=step(fresh))
