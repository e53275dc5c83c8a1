"""A mixture of experts from the command line: spread over ranks, resumed on others, started from either format."""

import numpy as np
import pytest

from tests.support import tiny
from tests.support.hf_folders import FAMILIES_GOLDEN

KEY = "j_qwen3moe_vit300m"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """YAML file and curve of a run on one rank, with both router losses."""
    root = tmp_path_factory.mktemp("experts")
    config = tiny.prepared(root, run="single", hf_folder=FAMILIES_GOLDEN / "ckpt" / KEY)
    config.write_text(config.read_text() + "moe: {aux_loss: 0.5, z_loss: 0.01}\n")
    tiny.train(config, [])
    return root, config


def test_routers_are_in_the_metrics(setup):
    root, _ = setup
    for line in tiny.metrics(root / "single"):
        assert line["aux_loss"] >= 2.0 - 1e-6  # top-2: 2 where experts are used evenly
        assert sum(line["tokens_per_expert"].values()) == 2 * line["tokens"]
        assert line["expert_load_max"] == pytest.approx(max(line["expert_load_by_layer"].values()), abs=1e-3)
        assert set(line["expert_load_by_layer"]) == {"0", "1"}
        assert line["drop_rate"] == 0


@pytest.mark.distributed
def test_experts_on_two_ranks_resumed_on_one(setup, tmp_path):
    """Float32 sums in another order, carried by five updates, to 1e-5 relative."""
    root, config = setup
    run = f"runtime.run_dir={tmp_path}"
    spread = ["parallel.ep=2", "parallel.cp=2", "checkpoint.save_every=2"]
    tiny.train(config, [*spread, run, "optim.steps=3", "optim.warmup_steps=2"], ranks=2)
    tiny.train(config, [run], ranks=1)
    np.testing.assert_allclose(tiny.curve(tmp_path)[3:], tiny.curve(root / "single")[3:], rtol=2e-2)


def test_either_format_gives_the_same_curve_to_the_bit(setup, tmp_path):
    _, config = setup
    for folder in ("ckpt", "ckpt_hf"):
        source = f"model.hf_path={FAMILIES_GOLDEN / folder / KEY}"
        tiny.train(config, [source, "model.checkpoint=''", f"runtime.run_dir={tmp_path / folder}"])
    assert tiny.curve(tmp_path / "ckpt") == tiny.curve(tmp_path / "ckpt_hf")
