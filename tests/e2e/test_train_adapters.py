"""Adapters from the command line: trained, resumed, evaluated on top of their base, merged, exported to PEFT."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.adapter_record import RECORD_FILE
from megatron_v2pe.checkpoint.files.folder import hf_path, state_path
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.messages import Message, build_prompt
from megatron_v2pe.parallel.topology import shutdown
from tests.support import tiny

# The projector is trained whole; alpha 8 makes scales differ: 2 on rank 4, 4 on rank 2.
LORA = ["lora.language_rank=4", "lora.vision_rank=2", "lora.alpha=8", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A run of five steps on one rank, with checkpoints after 2, 4 and 5."""
    root = tmp_path_factory.mktemp("lora")
    checkpoint = tiny.import_golden(root / "base")
    meta = tiny.make_data(root / "data")
    config = tiny.run_yaml(root / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=root / "run")
    tiny.train(config, [*LORA, "checkpoint.save_every=2", "checkpoint.keep=5"])
    return root, config, tiny.curve(root / "run")


def tensors(folder):
    reader = StateReader(state_path(folder))
    return {key: reader.read(key) for key in reader.tensors}


def test_the_loss_falls_and_the_checkpoint_holds_what_was_trained(setup):
    root, _, curve = setup
    assert curve[-1][0] < curve[0][0]
    stored = tensors(step_path(root / "run", 5))
    own = {key for key in stored if not key.startswith("optimizer.")}
    assert {key.partition(".")[0] for key in own if ".lora." not in key} == {"projector"}
    assert len([key for key in own if key.endswith(".lora_B")]) == len(
        [key for key in own if key.endswith(".lora_A")]
    )
    assert {key.split(".", 3)[3] for key in stored if key.startswith("optimizer.")} == own
    assert all(stored[key].any() for key in own)


def step_two(run_dir, target):
    """A run as it was after its second step."""
    shutil.copytree(run_dir, target)
    for step in (4, 5):
        shutil.rmtree(step_path(target, step))
    (target / "checkpoints" / "latest").write_text("step_00000002\n")
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:2]))


def test_resumed_equals_uninterrupted_bit_for_bit(setup, tmp_path):
    root, config, wanted = setup
    step_two(root / "run", tmp_path / "run")
    tiny.train(config, [*LORA, f"runtime.run_dir={tmp_path / 'run'}"])
    assert tiny.curve(tmp_path / "run") == wanted
    one, other = (tensors(step_path(run, 5)) for run in (root / "run", tmp_path / "run"))
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
@pytest.mark.distributed
def test_a_first_stage_that_trains_nothing_saves_and_resumes(setup, tmp_path):
    """mcore stores rank 0's groups for all ranks, so rank 0 has to know how many updates there were.

    It has no tensor to copy for a save in the background either, and still does what the others do.
    """
    _, config, _ = setup
    stages = [
        "parallel.pp=2",
        "parallel.pipeline_layout=E|ttL",
        "checkpoint.save_every=2",
        "checkpoint.keep=5",
    ]
    alone = ["lora.language_rank=4", "optim.lr=1e-2", "vision.freeze=true", "model.freeze_projector=true"]
    tiny.train(config, [*stages, *alone, f"runtime.run_dir={tmp_path / 'run'}"], ranks=2)
    wanted = tiny.curve(tmp_path / "run")
    step_two(tmp_path / "run", tmp_path / "resumed")
    tiny.train(config, [*stages, *alone, f"runtime.run_dir={tmp_path / 'resumed'}"], ranks=2)
    assert tiny.curve(tmp_path / "resumed") == wanted


@pytest.mark.slow
@pytest.mark.distributed
def test_resumed_on_two_ranks_and_the_tower_split(setup, tmp_path):
    root, config, wanted = setup
    step_two(root / "run", tmp_path / "run")
    split = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.vision=tensor"]
    tiny.train(config, [*LORA, *split, f"runtime.run_dir={tmp_path / 'run'}"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "run"), wanted, rtol=1e-5)


def logits(checkpoint, image):
    """Logits of three greedy steps after a question about an image."""
    arch = read_architecture(hf_path(checkpoint))
    settings = sample_settings(RunConfig(), arch, hf_path(checkpoint))
    question = Message(role="human", text="What is on the page?", images=(str(image),))
    prompt = build_prompt([question], settings=settings, stride=4)
    engine = Engine.load(checkpoint, mode="v2pe_fixed", norm=NORMALIZATION["imagenet"])
    steps = list(engine.stream(prompt, max_new_tokens=3, logits=True))
    shutdown()
    return torch.stack([step.logits for step in steps])


def test_merged_weights_answer_like_adapters(setup, tmp_path, capsys):
    """float32: W x + s B A x against (W + s B A) x, rounded in another order through all layers."""
    root, _, _ = setup
    adapters, image = step_path(root / "run", 5), root / "data" / "0.png"
    assert main(["export-hf", str(adapters), str(tmp_path / "hf")]) == 0
    assert main(["verify-numerics", str(tmp_path / "hf"), str(adapters)]) == 0
    import_hf(tmp_path / "hf", tmp_path / "merged")
    one, other, base = (logits(path, image) for path in (adapters, tmp_path / "merged", root / "base"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert (one - base).abs().max() > 0.1
    assert main(["verify", str(tmp_path / "hf"), str(adapters)]) == 0
    capsys.readouterr()


def peft_delta(weights, config, module):
    """What PEFT adds to a module: scaling, ranks and alphas as `LoraLayer` reads them."""
    name = next((key for key in config["rank_pattern"] if module.endswith(key)), None)
    rank, alpha = (
        config["rank_pattern"].get(name, config["r"]),
        config["alpha_pattern"].get(name, config["lora_alpha"]),
    )
    a, b = (weights[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
    assert (a.shape[0], b.shape[1]) == (rank, rank)
    return alpha / rank * (b.double() @ a.double())


def test_peft_folder_and_merged_folder_say_the_same(setup, tmp_path, capsys):
    """merged = W + alpha / r * B A by PEFT's names, and everything else is the base, or was trained whole."""
    root, _, _ = setup
    adapters = step_path(root / "run", 5)
    for _ in range(2):
        assert main(["export-hf", str(adapters), str(tmp_path / "peft"), "--adapter", "--force"]) == 0
    assert main(["export-hf", str(adapters), str(tmp_path / "hf")]) == 0
    assert "tensors for PEFT" in capsys.readouterr().out
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, ["mlp1"])
    assert config["rank_pattern"] == dict.fromkeys(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), 2)
    assert set(config["target_modules"]) == {"wqkv", "wo", "w1", "w2", "w3", *config["rank_pattern"]}
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    modules = {
        key.removeprefix("base_model.model.").rpartition(".lora_A")[0] for key in weights if "lora_A" in key
    }
    base, merged = (
        load_file(tiny.GOLDEN_HF / "model.safetensors"),
        load_file(tmp_path / "hf" / "model.safetensors"),
    )
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        module = name.removesuffix(".weight")
        if module in modules:
            wanted = (base[name].double() + peft_delta(weights, config, module)).to(base[name].dtype)
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(
                tensor, weights[f"base_model.model.{name}"] if name.startswith("mlp1") else base[name]
            )


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_mistakes_are_reported(setup, tmp_path, capsys):
    root, config, _ = setup
    run_dir, adapters = f"runtime.run_dir={root / 'run'}", step_path(root / "run", 5)
    # resumed with other adapters
    assert "lora.language_rank is 8" in refused(
        capsys, "train", config, *LORA, "lora.language_rank=8", run_dir
    )
    assert "lora.alpha is 4.0" in refused(capsys, "train", config, *LORA, "lora.alpha=4", run_dir)
    assert "has adapters, but lora.*" in refused(capsys, "train", config, run_dir)
    assert "parts trained whole are none" in refused(
        capsys, "train", config, *LORA, "model.freeze_projector=true", run_dir
    )
    # names that are not there
    fresh = f"runtime.run_dir={tmp_path / 'run'}"
    message = refused(capsys, "train", config, *LORA, "lora.targets=[q_proj]", fresh)
    assert "language has wqkv, wo, w1, w3, w2" in message
    message = refused(capsys, "train", config, *LORA, "lora.targets=[wqkv]", fresh)
    assert "lora.vision_rank is 2, but none of lora.targets" in message
    # adapters where a whole model is needed, and the reverse
    message = refused(capsys, "train", config, f"model.checkpoint={adapters}", fresh)
    assert "holds adapters, not a whole model" in message
    message = refused(capsys, "export-hf", root / "base", tmp_path / "peft", "--adapter")
    assert "without --adapter" in message
    message = refused(
        capsys, "export-hf", adapters, tmp_path / "peft", "--adapter", "--max-shard-size", "1GB"
    )
    assert "has one file" in message


def test_a_base_that_is_gone_or_another_is_reported(setup, tmp_path, capsys):
    root, _, _ = setup
    shutil.copytree(step_path(root / "run", 5), tmp_path / "run" / "checkpoints" / "step_00000005")
    adapters = tmp_path / "run" / "checkpoints" / "step_00000005"
    export = ("export-hf", adapters, tmp_path / "hf")
    (root / "base").rename(root / "elsewhere")
    try:
        assert f"holds adapters of {root / 'base'}, which does not exist" in refused(capsys, *export)
        # moved together with the run, at the same relative place
        shutil.copytree(root / "elsewhere", tmp_path / "base")
        assert main([str(argument) for argument in export]) == 0
        info = tmp_path / "base" / "checkpoint.json"
        info.write_text(info.read_text() + "\n")
        assert "another checkpoint is there now" in refused(capsys, *export, "--force")
    finally:
        (root / "elsewhere").rename(root / "base")
    (adapters / RECORD_FILE).write_text("{}")
    assert "adapter.json" in refused(capsys, *export, "--force")
