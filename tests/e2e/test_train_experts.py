"""A mixture of experts from the command line: spread over ranks, resumed on others, started from either format."""

import shutil

import numpy as np
import pytest
import torch

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.retention import committed_steps, step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.errors import CheckpointError
from tests.support import tiny
from tests.support.hf_folders import FAMILIES_GOLDEN

KEY = "j_qwen3moe_vit300m"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """YAML file and curve of a run on one rank, with both router losses and a bias."""
    root = tmp_path_factory.mktemp("experts")
    config = tiny.prepared(root, run="single", hf_folder=FAMILIES_GOLDEN / "ckpt" / KEY)
    config.write_text(config.read_text() + "moe: {aux_loss: 0.5, z_loss: 0.01, bias_rate: 0.01}\n")
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


def test_a_bias_of_the_choice_is_trained_stored_and_not_lost(setup, tmp_path):
    root, config = setup
    lines = tiny.metrics(root / "single")
    assert [line["expert_bias_max"] for line in lines][:2] == pytest.approx([0.01, 0.02])
    tiny.train(config, ["moe.bias_rate=0", f"runtime.run_dir={tmp_path / 'without'}", "optim.steps=3"])
    without = tiny.curve(tmp_path / "without")
    assert without[0] == tiny.curve(root / "single")[0]
    assert without[2] != tiny.curve(root / "single")[2]
    checkpoint = step_path(root / "single", committed_steps(root / "single")[-1])
    table = read_info(checkpoint).run_state["expert_bias"]
    assert {layer: len(values) for layer, values in table.items()} == {"0": 8, "1": 8}
    with pytest.raises(CheckpointError, match="--drop-expert-bias"):
        export_hf(checkpoint, tmp_path / "hf")
    export_hf(checkpoint, tmp_path / "hf", drop_expert_bias=True)
    # A new run starts with the bias, and keeps it at rate 0.
    own = [f"model.checkpoint={checkpoint}", f"runtime.run_dir={tmp_path / 'next'}", "moe.bias_rate=0"]
    tiny.train(config, [*own, "optim.steps=1", "optim.warmup_steps=0"])
    (line,) = tiny.metrics(tmp_path / "next")
    assert line["expert_bias_max"] == pytest.approx(max(abs(v) for row in table.values() for v in row))


SPREAD = [
    "parallel.ep=2",
    "parallel.cp=2",
]  # two optimizers, one of them of the experts; one rank has a single one


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [(SPREAD, []), ([], SPREAD)], ids=["2 ranks to 1", "1 rank to 2"])
def test_experts_resumed_over_other_ranks(setup, tmp_path, first, then):
    """Two updates after the resume: a wrong step count of Adam shows in the second only."""
    root, config = setup
    own = [f"runtime.run_dir={tmp_path / 'run'}", "checkpoint.save_every=3", "checkpoint.keep=3"]
    tiny.train(config, [*own, *first], ranks=2 if first else 1)
    tiny.back_to(tmp_path / "run", "step_00000003")
    tiny.train(config, [*own, *then], ranks=2 if then else 1)
    np.testing.assert_allclose(tiny.curve(tmp_path / "run"), tiny.curve(root / "single"), rtol=1e-5)


def test_either_format_gives_the_same_curve_to_the_bit(setup, tmp_path):
    _, config = setup
    for folder in ("ckpt", "ckpt_hf"):
        source = f"model.hf_path={FAMILIES_GOLDEN / folder / KEY}"
        tiny.train(config, [source, "model.checkpoint=''", f"runtime.run_dir={tmp_path / folder}"])
    assert tiny.curve(tmp_path / "ckpt") == tiny.curve(tmp_path / "ckpt_hf")


@pytest.mark.slow
@pytest.mark.distributed
def test_experts_resumed_at_the_same_layout_to_the_bit(setup, tmp_path):
    """Losses, router metrics, weights, moments, and the bias of the choice, over ep 2 x cp 2."""
    _, config = setup
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    own = ["checkpoint.save_every=3", "checkpoint.keep=3", *SPREAD]
    tiny.train(config, [*own, f"runtime.run_dir={whole}"], ranks=2)
    shutil.copytree(whole, resumed)
    tiny.back_to(resumed, "step_00000003")
    tiny.train(config, [*own, f"runtime.run_dir={resumed}"], ranks=2)
    keys = ("loss", "grad_norm", "aux_loss", "z_loss", "tokens_per_expert", "drop_rate", "expert_bias_max")
    lines = [[{key: line[key] for key in keys} for line in tiny.metrics(run)] for run in (whole, resumed)]
    assert lines[0] == lines[1]
    last = [step_path(run, committed_steps(run)[-1]) for run in (whole, resumed)]
    tables = [read_info(checkpoint).run_state["expert_bias"] for checkpoint in last]
    assert tables[0] == tables[1]
    assert any(value for row in tables[0].values() for value in row)
    ours, theirs = (StateReader(state_path(checkpoint)) for checkpoint in last)
    assert ours.tensors == theirs.tensors
    assert [name for name in ours.tensors if not torch.equal(ours.read(name), theirs.read(name))] == []
