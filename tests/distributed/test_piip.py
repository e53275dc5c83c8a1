"""A pyramid whose gates are zero computes what the plain model does, to the bit, under every layout; then it learns."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from tests.support import tiny
from tests.support.piip import pyramid_checkpoint
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed
GOLDEN = Path(__file__).parent.parent / "golden"
ONE_RANK = ("one rank", {})
TWO_RANKS = (
    ("tp2", {"tp": 2}),
    ("tp2 sp", {"tp": 2, "sequence_parallel": True}),
    ("tp2 split tower", {"tp": 2, "vision": "tensor"}),
    ("cp2", {"cp": 2}),
    ("pp2", {"pp": 2}),
)


def losses_and_gradients(checkpoint, parallel, context, *, recompute):
    """Per-token losses of a golden case and every gradient of this rank, by name."""
    from megatron_v2pe.assembly.optim.optimizer import wrap_data_parallel
    from megatron_v2pe.assembly.schedule import run_schedule
    from megatron_v2pe.batch.packed_batch import tile_share
    from megatron_v2pe.checkpoint.files.folder import hf_path
    from megatron_v2pe.checkpoint.model_loading import load_model
    from megatron_v2pe.config.arch.architecture import read_architecture
    from megatron_v2pe.config.schema import RunConfig, RuntimeConfig, VisionConfig
    from megatron_v2pe.parallel.batch_sharder import BatchSharder
    from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
    from megatron_v2pe.verification.golden.cases import ForwardFile

    cases = ForwardFile.open(GOLDEN, GOLDEN / "forward" / "a_internlm2_vit300m.json").cases()
    case = next(case for case in cases if len(case.pixels()) > 1)
    arch = read_architecture(hf_path(checkpoint))
    config = RunConfig(
        parallel=parallel, runtime=RuntimeConfig(dtype="float32"), vision=VisionConfig(recompute=recompute)
    )
    model_chunks = load_model(checkpoint, config, arch, context)
    wrapped = wrap_data_parallel(model_chunks, config, shard_gradients=False)
    plan, ranks = context.plan, context.ranks
    sharder = BatchSharder(context=context, dtype=torch.float32)
    pixels = case.pixels()
    if arch.pyramid is not None:
        sizes = [F.interpolate(pixels, size=(size, size), mode="bilinear") for size in arch.tile_sizes[1:]]
        pixels = torch.cat([image.flatten(1) for image in (pixels, *sizes)], dim=1)

    def shard(pack, *, encodes_tiles):
        local = sharder.shard(pack, encodes_tiles=encodes_tiles)
        if not encodes_tiles:
            return local
        start, stop = tile_share(pack.num_tiles, plan.tile_ranks, ranks.tile_rank)
        return dataclasses.replace(local, pixels=pixels[start:stop])

    runner = MicroBatchRunner(shard=shard, device=ranks.device)
    attach(runner, wrapped)
    pack = case.pack(pad_to_multiple=plan.pad_to_multiple, loss_reduction="token")
    outputs = run_schedule(wrapped, runner.forward_step, [pack])
    losses = outputs[0]["losses"] if ranks.is_last_stage else None
    names = {}
    for chunk in model_chunks:
        names |= {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}
    return losses, names


def is_same(wanted, found, *, exact):
    """Equal to the bit; under recomputation a bias's gradient may be summed in another order (float32, 1e-6)."""
    if exact:
        return torch.equal(found, wanted)
    return float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


def compare(rank, world_size, plain, pyramid, layouts):
    """For each layout: shared gradients that differ, and the largest gradient of gates and of other new parameters."""
    from megatron.core import parallel_state

    from megatron_v2pe.config.schema import ParallelConfig
    from megatron_v2pe.parallel.topology import init_distributed, resolve

    found = {}
    for name, sizes in layouts:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        parallel = ParallelConfig(**sizes)
        context = init_distributed(resolve(parallel, world_size), seed=1, timeout_minutes=1)
        for recompute in ("none", "full") if name == "one rank" else ("none",):
            wanted, old = losses_and_gradients(plain, parallel, context, recompute=recompute)
            losses, new = losses_and_gradients(pyramid, parallel, context, recompute=recompute)
            same_loss = wanted is None or torch.equal(losses, wanted)
            differ = [key for key in old if not is_same(old[key], new[key], exact=recompute == "none")]
            added = {key: float(new[key].abs().max()) for key in new if key not in old}
            into_large = "interaction_units_12.branch2to1_injector.c"
            gates = [added[key] for key in added if into_large in key and key.endswith("gamma")]
            others = [added[key] for key in added if into_large not in key or not key.endswith("gamma")]
            found[f"{name}, recompute {recompute}"] = (
                same_loss,
                differ,
                min(gates, default=None),
                max(others, default=None),
            )
    return found


def check(found, *, holds_vision):
    for layout, (same_loss, differ, smallest_gate, largest_other) in found.items():
        assert same_loss, layout
        assert differ == [], layout
        if holds_vision(layout):
            assert smallest_gate > 0, layout
            assert largest_other == 0, layout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("piip")
    return str(tiny.import_golden(folder / "plain")), str(pyramid_checkpoint(folder / "pyramid"))


def test_zero_gates_change_nothing_on_one_rank(checkpoints):
    (found,) = run_ranks(compare, 1, *checkpoints, (ONE_RANK,), timeout=90)
    check(found, holds_vision=lambda _layout: True)
    assert len(found) == 2


def test_zero_gates_change_nothing_on_two_ranks(checkpoints):
    by_rank = run_ranks(compare, 2, *checkpoints, TWO_RANKS, timeout=200)
    for rank, found in enumerate(by_rank):
        check(found, holds_vision=lambda layout, rank=rank: rank == 0 or not layout.startswith("pp2"))
        assert len(found) == len(TWO_RANKS)


def train(folder, checkpoint, meta, name, overrides=(), **options):
    run = tiny.run_yaml(folder / f"{name}.yaml", checkpoint=checkpoint, meta=meta, run_dir=folder / name)
    tiny.train(run, [*overrides], **options)
    return folder / name


@pytest.mark.slow
def test_a_pyramid_trains_alike_on_one_and_two_ranks_and_is_resumed_in_another_layout(checkpoints, tmp_path):
    """Losses of five updates to 1e-5 relative; three steps at tp 2 with a split tower, then two at pp 2."""
    _, checkpoint = checkpoints
    meta = tiny.make_data(tmp_path / "data")
    whole = train(tmp_path, checkpoint, meta, "whole")
    often = ["checkpoint.save_every=3", "checkpoint.keep=9", "vision.tower=piip"]
    train(tmp_path, checkpoint, meta, "moved", [*often, "parallel.tp=2", "parallel.vision=tensor"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "moved"), tiny.curve(whole), rtol=1e-5)
    tiny.back_to(tmp_path / "moved", "step_00000003")
    train(tmp_path, checkpoint, meta, "moved", [*often, "parallel.pp=2"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "moved"), tiny.curve(whole), rtol=1e-5)
    export_hf(whole / "checkpoints" / "step_00000005", tmp_path / "out")
    before = load_file(Path(checkpoint + "_hf") / "piip.safetensors")
    after = load_file(tmp_path / "out" / "piip.safetensors")
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    gates = [x for name, x in after.items() if name.endswith("branch2to1_injector.ca_gamma")]
    assert min(float(x.abs().max()) for x in gates) > 0
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    for part in ("branches.0.", "branches.1.", "interactions.0.", "interactions.1."):
        assert any(part in name for name in moved), part


@pytest.mark.slow
def test_gradients_reduced_while_backward_runs(checkpoints, tmp_path):
    """Overlapped reduction waits for each parameter of a bucket: all of a pyramid's get gradients in each step."""
    _, checkpoint = checkpoints
    meta = tiny.make_data(tmp_path / "data")
    common = ["optim.global_batch_size=2", "optim.steps=3"]
    plain = train(tmp_path, checkpoint, meta, "plain", common, ranks=2)
    overlap = [*common, "parallel.overlap_grad_reduce=true"]
    overlapped = train(tmp_path, checkpoint, meta, "overlapped", overlap, ranks=2)
    np.testing.assert_allclose(tiny.curve(overlapped), tiny.curve(plain), rtol=1e-6)
