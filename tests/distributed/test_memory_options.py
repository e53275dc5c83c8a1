"""Options that trade time for memory: gradients stay what they were, and less is kept for backward.

Two context parallel ranks encode 3 and 2 tiles (and, in a second pack, 1 and 0), so that slices differ in number.
Everything is compared with the run that keeps all activations. float32; recomputation repeats the same operations,
so only sums over slices, MLP chunks and loss chunks are in another order: 2e-5 of a parameter's largest gradient.
"""

import collections
import dataclasses
import weakref

import numpy as np
import pytest
import torch

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from tests.support.packs import batch_of, layout_of
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 2e-5
ARCH = parse_architecture(
    {
        "model_type": "internvl_chat",
        "force_image_size": 56,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "patch_size": 14,
            "image_size": 56,
        },
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 192,
            "vocab_size": 1200,
        },
    }
)
PACKS = ([[5, "2@4", 9, "3@4", 6], [12]], [[7, "1@4", 9]])
VARIANTS = {
    "selective": dict(model=ModelConfig(recompute="selective")),
    "full": dict(model=ModelConfig(recompute="full")),
    "full, offloaded": dict(model=ModelConfig(recompute="full")),
    "selective, MLP chunks": dict(model=ModelConfig(recompute="selective", mlp_chunks=3)),
    "full, MLP chunks": dict(model=ModelConfig(recompute="full", mlp_chunks=3)),
    "fused SwiGLU": dict(model=ModelConfig(swiglu="fused")),
    "tile multiple": dict(vision=VisionConfig(tile_multiple=4)),
    "loss chunks": dict(model=ModelConfig(loss_chunk_tokens=5)),
    "vision selective": dict(vision=VisionConfig(recompute="selective")),
    "vision full": dict(vision=VisionConfig(recompute="full")),
    "slices of 1": dict(vision=VisionConfig(micro_batch_tiles=1)),
    "slices of 2": dict(vision=VisionConfig(micro_batch_tiles=2)),
    "slices of 2, full": dict(vision=VisionConfig(micro_batch_tiles=2, recompute="full")),
    "frozen tower": dict(vision=VisionConfig(freeze=True)),
    "frozen tower, slices": dict(vision=VisionConfig(freeze=True, micro_batch_tiles=1)),
    "frozen tower, full": dict(vision=VisionConfig(freeze=True, recompute="full")),
    "frozen language, full": dict(model=ModelConfig(freeze_language=True, recompute="full")),
    "frozen language, slices": dict(
        model=ModelConfig(freeze_language=True), vision=VisionConfig(micro_batch_tiles=1)
    ),
    "frozen tower and projector, slices": dict(
        model=ModelConfig(freeze_projector=True), vision=VisionConfig(freeze=True, micro_batch_tiles=1)
    ),
    "drop path, slices kept": dict(vision=VisionConfig(drop_path_rate=0.5, micro_batch_tiles=1)),
    "drop path, slices": dict(vision=VisionConfig(drop_path_rate=0.5, micro_batch_tiles=1)),
    "drop path": dict(vision=VisionConfig(drop_path_rate=0.5)),
    "drop path, full": dict(vision=VisionConfig(drop_path_rate=0.5, recompute="full")),
}


def batches(tile_rank, tile_ranks, pad_to_multiple):
    """The packs with tiles of noise, of which a rank has its share."""
    from megatron_v2pe.batch.packed_batch import tile_share

    found = []
    for number, documents in enumerate(PACKS):
        layout = layout_of(documents, pad_to_multiple=pad_to_multiple)
        share = tile_share(layout.num_tiles, tile_ranks, tile_rank)
        pixels = np.random.default_rng(number).integers(0, 256, (layout.num_tiles, 3, 56, 56), dtype=np.uint8)
        batch = batch_of(layout, tile_range=share, tile_size=56)
        found.append(dataclasses.replace(batch, tiles=pixels[slice(*share)]))
    return found


class Handle:
    def __init__(self, tensor):
        self.tensor = tensor


class Kept:
    """Most bytes of distinct tensors, parameters aside, that autograd keeps at a time."""

    def __init__(self):
        self.users, self.now, self.peak = collections.Counter(), 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        handle = Handle(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            place, size = storage.data_ptr(), storage.nbytes()
            self.now += 0 if self.users[place] else size
            self.users[place] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(handle, self._drop, place, size)
        return handle

    def _drop(self, place, size):
        self.users[place] -= 1
        self.now -= 0 if self.users[place] else size


def one_pass(config, context, *, patch=None):
    """One forward and backward pass; see `Pass`."""
    from megatron_v2pe.assembly.build import build_model
    from megatron_v2pe.assembly.optim.optimizer import wrap_data_parallel
    from megatron_v2pe.assembly.schedule import run_schedule
    from megatron_v2pe.batch.pixel_norm import PixelNorm
    from megatron_v2pe.parallel.batch_sharder import BatchSharder
    from megatron_v2pe.train.forward_step import MicroBatchRunner, attach

    plan, ranks = context.plan, context.ranks
    (model,) = build_model(config, ARCH, context)
    rows = {
        "mlp": largest_input(model.language.decoder.layers[0].mlp.linear_fc1),
        "tiles": largest_input(model.vision.patch_embedding),
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_norm = name.endswith("norm.weight")
            parameter.normal_(1.0 if is_norm else 0.0, 0.08, generator=generator)
    wrapped = wrap_data_parallel([model], config, shard_gradients=False)
    wrapped[0].train()
    if patch is not None:
        patch(model)
    norm = PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    sharder = BatchSharder(context=context, dtype=torch.float32, norm=norm)
    runner = MicroBatchRunner(shard=sharder.shard, device=ranks.device)
    attach(runner, wrapped)
    torch.manual_seed(11)
    kept = Kept()
    packs = batches(ranks.tile_rank, plan.tile_ranks, plan.pad_to_multiple)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda handle: handle.tensor):
        loss = run_schedule(wrapped, runner.forward_step, packs)
    gradients = {
        name: parameter.main_grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Pass([float(part["loss_sum"]) for part in loss], gradients, kept.peak, rows)


@dataclasses.dataclass
class Pass:
    """Losses, gradients by name, peak of the bytes kept for backward, and most rows that parts were given."""

    losses: list
    gradients: dict
    kept: int
    rows: dict


def largest_input(module):
    """A list that holds the most rows (dimension 0) the module was given so far."""
    most = [0]
    module.register_forward_pre_hook(lambda _module, args: most.__setitem__(0, max(most[0], len(args[0]))))
    return most


def keep_slices(model):
    """Slices as they are, without recomputation: what `recomputed` must agree with."""
    model._recomputed_features = model._features


def offload(model):
    """What `model.offload_activations` does on a GPU, from host memory to host memory."""
    elsewhere = torch.autograd.graph.save_on_cpu(pin_memory=True)
    model.language.memory = dataclasses.replace(model.language.memory, offload=elsewhere)


PATCHES = {"drop path, slices kept": keep_slices, "full, offloaded": offload}
REFERENCES = {"drop path, slices": "drop path, slices kept", "drop path, full": "drop path"}


def all_variants(rank, world_size):
    """Each variant's pass, with the worst gradient error against its reference in place of the gradients."""
    from megatron_v2pe.parallel.topology import init_distributed, resolve

    parallel = ParallelConfig(cp=world_size)
    plan = resolve(parallel, world_size)
    context = init_distributed(plan, seed=1, timeout_minutes=1)
    base = RunConfig(parallel=parallel, runtime=RuntimeConfig(dtype="float32"))
    results, gradients = {}, {}
    for name, sections in {"base": {}, **VARIANTS}.items():
        done = one_pass(dataclasses.replace(base, **sections), context, patch=PATCHES.get(name))
        gradients[name] = done.gradients
        error = worst(done.gradients, gradients[REFERENCES.get(name, "base")])
        results[name] = dataclasses.replace(done, gradients=error)
    return results


def worst(gradients, wanted):
    """Largest deviation of a gradient, relative to the parameter's largest."""
    return max(
        float((gradient - wanted[name]).abs().max() / wanted[name].abs().max())
        for name, gradient in gradients.items()
    )


@pytest.fixture(scope="module")
def results():
    return run_ranks(all_variants, 2, timeout=120)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_stay_the_same(results, name):
    if name in ("drop path", "drop path, slices kept"):
        assert (
            results[0][name].gradients > 1e-3
        )  # drop path does something, so agreeing with it says something
        return
    reference = REFERENCES.get(name, "base")
    for rank in results:
        assert rank[name].losses == pytest.approx(rank[reference].losses, rel=1e-5)
        assert rank[name].gradients <= TOLERANCE


LESS = [
    ("selective", "base"),
    ("full", "selective"),
    ("full, offloaded", "full"),
    ("vision selective", "base"),
    ("vision full", "vision selective"),
    ("slices of 1", "vision full"),
    ("slices of 2", "base"),
    ("frozen tower", "base"),
    ("frozen tower, slices", "frozen tower"),
]


@pytest.mark.parametrize(("less", "more"), LESS)
def test_less_is_kept_for_backward(results, less, more):
    assert results[0][less].kept < results[0][more].kept


def test_a_frozen_tower_keeps_no_graph(results):
    assert results[0]["frozen tower, full"].kept == results[0]["frozen tower"].kept


def test_parts_are_given_what_was_asked_for(results):
    """The tower a slice of tiles, the MLP a third of the tokens: ranks hold 3 and 2 of the first pack's tiles."""
    tiles = [rank["base"].rows["tiles"][0] for rank in results]
    assert tiles == [3, 2]
    assert [rank["slices of 2"].rows["tiles"][0] for rank in results] == [2, 2]
    assert [rank["slices of 1"].rows["tiles"][0] for rank in results] == [1, 1]
    whole = results[0]["base"].rows["mlp"][0]
    for name in ("selective, MLP chunks", "full, MLP chunks"):
        assert results[0][name].rows["mlp"][0] == -(-whole // 3)
