"""LLaVA's readout of a pyramid in other layouts: the same losses and gradient norms, and a run that moves on."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from tests.support import tiny
from tests.support.piip import pyramid_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LLAVA = {"readout": "llava", "readout_grid": 5}
LAYOUTS = {
    "split tower": ["parallel.tp=2", "parallel.vision=tensor"],
    "split tower, sequence parallel": [
        "parallel.tp=2",
        "parallel.vision=tensor",
        "parallel.sequence_parallel=true",
    ],
    "tiles shared over tp": ["parallel.tp=2", "parallel.sequence_parallel=true"],
    "cp": ["parallel.cp=2"],
    "pp": ["parallel.pp=2"],
    "dp, gradients reduced while backward runs": ["parallel.overlap_grad_reduce=true"],
    "slices of tiles": ["vision.micro_batch_tiles=2", "parallel.cp=2"],
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("piip_readout_layouts")
    pyramid_checkpoint(root / "pyramid", gates=True, **LLAVA)
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_what_one_does(setup, name):
    """Losses and gradient norms of five updates to 1e-5 relative (float32 sums in another order)."""
    found = run(setup, name.replace(" ", "_").replace(",", ""), LAYOUTS[name], ranks=2)
    np.testing.assert_allclose(tiny.curve(found), tiny.curve(setup / "whole"), rtol=1e-5)


def test_a_run_moves_to_another_layout_and_is_exported(setup, tmp_path):
    """Three steps with a split tower, two with two stages; the folder differs by rounding only."""
    often = ["checkpoint.save_every=3"]
    moved = run(setup, "moved", [*often, *LAYOUTS["split tower"]], ranks=2)
    tiny.back_to(moved, "step_00000003")
    moved = run(setup, "moved", [*often, *LAYOUTS["pp"]], ranks=2)
    np.testing.assert_allclose(tiny.curve(moved), tiny.curve(setup / "whole"), rtol=1e-5)
    for name, folder in (("one", setup / "whole"), ("two", moved)):
        export_hf(folder / "checkpoints" / "step_00000005", tmp_path / name)
    one, two = (load_file(tmp_path / name / PYRAMID_FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    before = load_file(setup / "pyramid_hf" / PYRAMID_FILE)
    assert all(not torch.equal(one[name], before[name]) for name in one if name.startswith("mm_projector."))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
