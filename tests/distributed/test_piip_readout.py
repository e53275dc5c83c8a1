"""LLaVA's readout of a pyramid in other layouts: every gradient in float64, and a run that moves to another layout."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.schema import ParallelConfig, PositionConfig, RunConfig, RuntimeConfig, VisionConfig
from tests.support import tiny
from tests.support.piip import RECIPE, pyramid_checkpoint
from tests.support.spawn import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LLAVA = {"readout": "llava", "readout_grid": 5}
TOKENS = 25
LIMIT = 1e-11
"""Of a gradient's error relative to its largest value, in float64: sums in another order. A lost tile or a gradient
that is counted twice is an error of 1e-2 and more."""

LAYOUTS = {
    "tiles shared over tp": {"tp": 2, "sequence_parallel": True},
    "split tower": {"tp": 2, "vision": "tensor"},
    "split tower, sequence parallel": {"tp": 2, "vision": "tensor", "sequence_parallel": True},
    "cp": {"cp": 2},
    "pp": {"pp": 2},
    "slices of tiles": {"cp": 2, "slices": 2},
    "recomputed": {"tp": 2, "recompute": "full"},
}


def architecture(**readout):
    config = json.loads((tiny.GOLDEN_HF / "config.json").read_text())
    branches = [{key: value for key, value in row.items() if key != "weights"} for row in RECIPE["branches"]]
    return parse_architecture({**config, "piip_config": {**RECIPE, **LLAVA, **readout, "branches": branches}})


def pack_shapes():
    """Two micro batches: documents with three, one and no images; strides of their own; labels on the last third."""
    from megatron_v2pe.v2pe.layout import SampleLayout
    from megatron_v2pe.verification.prove.shapes import DocumentShape

    def document(num_tokens, starts, tiles, strides):
        layout = SampleLayout(
            num_tokens=num_tokens,
            image_starts=np.array(starts, dtype=np.int64),
            num_tiles=np.array(tiles, dtype=np.int64),
            strides=np.array(strides, dtype=np.int64),
            tokens_per_tile=TOKENS,
        )
        weights = (np.arange(num_tokens) > 2 * num_tokens // 3).astype(np.float32)
        return DocumentShape(layout=layout, weights=weights)

    first = (document(190, [5, 60, 120], [2, 1, 2], [3, 16, 25]), document(31, [], [], []))
    return [first, (document(70, [4], [1], [1]),)]


def outcome(world_size, sizes, arch):
    """Forward and backward of `train`'s parts in float64, weights drawn from names."""
    from megatron_v2pe.batch.packed_batch import tile_share
    from megatron_v2pe.parallel.topology import init_distributed, resolve
    from megatron_v2pe.verification.prove.shapes import filled_pack
    from megatron_v2pe.verification.prove.steps import run_backward

    parallel = {key: value for key, value in sizes.items() if key not in ("slices", "recompute")}
    vision = VisionConfig(
        micro_batch_tiles=sizes.get("slices", 0), recompute=sizes.get("recompute", "none"), tower="piip"
    )
    config = RunConfig(
        parallel=ParallelConfig(**parallel),
        runtime=RuntimeConfig(dtype="float64"),
        vision=vision,
        position=PositionConfig(mode="v2pe_random"),
    )
    context = init_distributed(resolve(config.parallel, world_size), seed=1, timeout_minutes=2)
    plan, ranks = context.plan, context.ranks

    def share(num_tiles):
        return tile_share(num_tiles, plan.tile_ranks, ranks.tile_rank) if ranks.is_first_stage else (0, 0)

    packs = [
        filled_pack(shape, number, arch, pad_to_multiple=plan.pad_to_multiple, tile_range_of=share)
        for number, shape in enumerate(pack_shapes())
    ]
    return run_backward(config, arch, context, packs)


def alone(rank, world_size, path):
    from megatron_v2pe.verification.prove.steps import wholes

    arch = architecture()
    torch.save(wholes(outcome(world_size, {}, arch), vocab_size=arch.language.vocab_size), path)


def in_layouts(rank, world_size, path):
    """Largest errors of loss and gradients by layout."""
    from megatron.core import parallel_state

    from megatron_v2pe.verification.prove.steps import compare

    wanted = torch.load(path, weights_only=True)
    found = {}
    for name, sizes in LAYOUTS.items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        found[name] = compare(outcome(world_size, sizes, architecture()), wanted)
    return found


def test_every_gradient_of_two_ranks_is_that_of_one(tmp_path):
    path = str(tmp_path / "alone.pt")
    run_ranks(alone, 1, path, timeout=200)
    keys = torch.load(path, weights_only=True)["gradient_scales"]
    assert all(scale > 0 for scale in keys.values()), [key for key, scale in keys.items() if not scale]
    assert sum(key.startswith("projector.merge.") for key in keys) == 18
    for found in run_ranks(in_layouts, 2, path, timeout=400):
        assert set(found) == set(LAYOUTS)
        for layout, errors in found.items():
            assert errors["loss"][0] < LIMIT, (layout, errors)
            assert errors["gradient"][0] < LIMIT, (layout, errors)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("piip_readout_layouts")
    pyramid_checkpoint(root / "pyramid", **LLAVA)
    tiny.make_data(root / "data")
    run(root, "whole")
    return root


def run(root, name, overrides=(), *, ranks=1):
    config = tiny.run_yaml(
        root / f"{name}.yaml",
        checkpoint=root / "pyramid",
        meta=root / "data" / "meta.json",
        run_dir=root / name,
    )
    tiny.train(config, [*overrides, "vision.tower=piip", "checkpoint.keep=9"], ranks=ranks)
    return root / name


def test_gradients_reduced_while_backward_runs(setup):
    """Overlapped reduction waits for each parameter of a bucket: all of the readout's get gradients in each step."""
    found = run(setup, "overlapped", ["parallel.overlap_grad_reduce=true"], ranks=2)
    np.testing.assert_allclose(tiny.curve(found), tiny.curve(setup / "whole"), rtol=1e-5)


def test_a_run_moves_to_another_layout_and_is_exported(setup, tmp_path):
    """Three steps with a split tower, two with two stages; the folder differs by rounding only."""
    often = ["checkpoint.save_every=3"]
    moved = run(setup, "moved", [*often, "parallel.tp=2", "parallel.vision=tensor"], ranks=2)
    tiny.back_to(moved, "step_00000003")
    moved = run(setup, "moved", [*often, "parallel.pp=2"], ranks=2)
    np.testing.assert_allclose(tiny.curve(moved), tiny.curve(setup / "whole"), rtol=1e-5)
    for name, folder in (("one", setup / "whole"), ("two", moved)):
        export_hf(folder / "checkpoints" / "step_00000005", tmp_path / name)
    one, two = (load_file(tmp_path / name / PYRAMID_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    before = load_file(setup / "pyramid_hf" / PYRAMID_FILE)
    assert all(not torch.equal(one[name], before[name]) for name in one if name.startswith("mm_projector."))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
