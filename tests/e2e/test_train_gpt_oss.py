"""GPT-OSS from the command line: trained, resumed over other ranks, with adapters, exported in both formats, asked.

Strategy: the golden checkpoint (sinks, windows of 8 tokens, YaRN, clamped experts), packs of V2PE strides. Curves of
other layouts differ from one rank's by rounding, 1e-5; both formats of a folder give the same curve to the bit.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.retention import committed_steps, step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.inference.chat import Chat, ChatOptions
from megatron_v2pe.inference.sampling import Sampling
from tests.support import tiny
from tests.support.hf_folders import FAMILIES_GOLDEN

KEY = "l_gptoss_vit300m"
LAYER = "language_model.model.layers.0."
SPREAD = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """YAML file and curve of a run on one rank."""
    root = tmp_path_factory.mktemp("gpt_oss")
    config = tiny.prepared(root, run="single", hf_folder=FAMILIES_GOLDEN / "ckpt" / KEY)
    config.write_text(config.read_text() + "moe: {aux_loss: 0.01}\n")
    tiny.train(config, [])
    return root, config


def newest(run_dir):
    return step_path(run_dir, committed_steps(run_dir)[-1])


def test_everything_is_trained_and_comes_back_in_both_formats(setup, tmp_path):
    root, _ = setup
    losses = [loss for loss, _ in tiny.curve(root / "single")]
    assert losses[-1] < losses[0]
    export_hf(newest(root / "single"), tmp_path / "github")
    export_hf(newest(root / "single"), tmp_path / "native", to="hf-native")
    before = load_file(FAMILIES_GOLDEN / "ckpt" / KEY / "model.safetensors")
    github, native = (load_file(tmp_path / name / "model.safetensors") for name in ("github", "native"))
    assert set(github) == set(before)
    for name in ("self_attn.sinks", "self_attn.o_proj.bias", "mlp.router.bias", "mlp.experts.down_proj_bias"):
        assert not torch.equal(github[LAYER + name].float(), before[LAYER + name].float()), name
        assert torch.equal(github[LAYER + name], native[LAYER + name]), name
    unchanged = [name for name in before if torch.equal(github[name].float(), before[name].float())]
    assert unchanged == []
    assert json.loads((tmp_path / "native" / "generation_config.json").read_text())["eos_token_id"] == 356


def test_an_answer_is_text_without_its_header(setup):
    root, _ = setup
    chat = Chat(newest(root / "single"), ChatOptions(dtype="float32", stride=8))
    pieces = list(chat.answer("What is on the page?", sampling=Sampling(max_new_tokens=8)))
    assert chat.header.ids[0] == chat.tokenizer.token_id("<|channel|>")
    assert not any("channel" in piece for piece in pieces)
    assert chat.stop_ids == {chat.tokenizer.token_id("<|return|>")}


@pytest.mark.distributed
def test_resumed_over_other_ranks(setup, tmp_path):
    root, config = setup
    own = [f"runtime.run_dir={tmp_path / 'run'}", "checkpoint.save_every=3", "checkpoint.keep=3"]
    tiny.train(config, [*own, *SPREAD], ranks=2)
    tiny.back_to(tmp_path / "run", "step_00000003")
    tiny.train(config, own)
    np.testing.assert_allclose(tiny.curve(tmp_path / "run"), tiny.curve(root / "single"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.cp=2", "parallel.ep=2"],
        ["parallel.pp=2"],
        ["parallel.cp=2", "parallel.cp_comm_type=a2a"],
        ["parallel.tp=2", "parallel.sequence_parallel=true"],  # experts split, too
    ],
    ids=["cp2 ep2", "pp2", "a2a", "etp2"],
)
def test_layouts_give_one_curve(setup, tmp_path, layout):
    root, config = setup
    tiny.train(config, [f"runtime.run_dir={tmp_path / 'run'}", *layout], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "run"), tiny.curve(root / "single"), rtol=1e-5)


@pytest.mark.slow
def test_either_format_gives_the_same_curve_to_the_bit(setup, tmp_path):
    _, config = setup
    for folder in ("ckpt", "ckpt_hf"):
        source = f"model.hf_path={FAMILIES_GOLDEN / folder / KEY}"
        tiny.train(config, [source, "model.checkpoint=''", f"runtime.run_dir={tmp_path / folder}"])
    assert tiny.curve(tmp_path / "ckpt") == tiny.curve(tmp_path / "ckpt_hf")


@pytest.mark.slow
def test_adapters_of_attention(setup, tmp_path):
    """Experts carry none; the bias of the output projection stays what it was."""
    _, config = setup
    tiny.train(config, ["lora.language_rank=4", "optim.lr=1e-2", f"runtime.run_dir={tmp_path / 'run'}"])
    own = StateReader(state_path(newest(tmp_path / "run"))).tensors
    linears = {name.split(".lora.")[0].rpartition(".")[2] for name in own if ".lora." in name}
    assert linears == {"linear_qkv", "linear_proj"}
    export_hf(newest(tmp_path / "run"), tmp_path / "merged")
    before = load_file(FAMILIES_GOLDEN / "ckpt" / KEY / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {
        name.removeprefix(LAYER)
        for name in before
        if name.startswith(LAYER) and not torch.equal(merged[name].float(), before[name].float())
    }
    assert changed == {f"self_attn.{kind}_proj.weight" for kind in "qkvo"}
