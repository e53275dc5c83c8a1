"""A pyramid from the command line: generated with, evaluated, its large branch frozen or with adapters, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.add_pyramid import PYRAMID_FILE
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.cli.main import main
from tests.support import tiny
from tests.support.piip import pyramid_checkpoint
from tests.support.warm import run_verb

FROZEN = ["vision.tower=piip", "vision.freeze_large_branch=true", "optim.lr=1e-2"]
ADAPTED = ["vision.tower=piip", "lora.vision_rank=2", "lora.language_rank=2", "optim.lr=1e-2"]
NEW = ("vision.branches.", "vision.interactions.")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("piip_runs")
    pyramid_checkpoint(root / "pyramid")
    tiny.make_data(root / "data")
    return root


def trained(root, name, overrides, *, steps=3, ranks=1):
    config = tiny.run_yaml(
        root / f"{name}.yaml",
        checkpoint=root / "pyramid",
        meta=root / "data" / "meta.json",
        run_dir=root / name,
    )
    if not (root / name).exists():
        tiny.train(config, [*overrides, f"optim.steps={steps}"], ranks=ranks)
    return step_path(root / name, steps)


def answer(checkpoint, image, capsys, *, tokens=4):
    ask = ["generate", str(checkpoint), "What is it?", "--image", str(image), "--dtype", "float32"]
    assert main([*ask, "--max-new-tokens", str(tokens)]) == 0
    return capsys.readouterr().out


def scores(checkpoint, image, capsys):
    ask = ["generate", str(checkpoint), "What is it?", "--image", str(image), "--dtype", "float32"]
    ask += ["--stride", "4"]
    assert main([*ask, "--score", "a small red square"]) == 0
    return torch.tensor([json.loads(line)["logprob"] for line in capsys.readouterr().out.splitlines()])


def test_zero_gates_generate_what_the_plain_model_does(setup, capsys):
    tiny.import_golden(setup / "plain")
    image = setup / "data" / "0.png"
    wanted, found = (scores(setup / name, image, capsys) for name in ("plain", "pyramid"))
    assert len(wanted) > 3
    assert torch.equal(wanted, found)
    assert answer(setup / "plain", image, capsys) == answer(setup / "pyramid", image, capsys)


def tensors(folder):
    reader = StateReader(state_path(folder))
    return {key: reader.read(key) for key in reader.tensors if not key.startswith("optimizer.")}


@pytest.mark.slow
def test_a_frozen_large_branch_stays_and_the_pyramid_moves(setup, tmp_path, capsys):
    root, image = setup, setup / "data" / "0.png"
    checkpoint = trained(root, "frozen", FROZEN, steps=5)
    before, after = tensors(root / "pyramid"), tensors(checkpoint)
    large = [key for key in before if key.startswith("vision.") and not key.startswith(NEW)]
    assert large
    assert all(torch.equal(before[key], after[key]) for key in large)
    for part in (
        "vision.branches.0.",
        "vision.branches.1.",
        "vision.interactions.0.",
        "vision.interactions.1.",
    ):
        assert any(key.startswith(part) and not torch.equal(before[key], after[key]) for key in before), part
    assert (scores(root / "pyramid", image, capsys) - scores(checkpoint, image, capsys)).abs().max() > 1e-3
    # Open gates may be frozen.
    again = [f"model.checkpoint={checkpoint}", f"runtime.run_dir={tmp_path / 'run'}", "vision.freeze=true"]
    tiny.train(root / "frozen.yaml", [*again, "optim.steps=2", "optim.warmup_steps=1"])
    assert len(tiny.metrics(tmp_path / "run")) == 2
    # Out, in again: the same answers, and the second implementation agrees.
    assert main(["export-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(checkpoint)]) == 0
    assert main(["verify-numerics", str(tmp_path / "hf"), str(checkpoint)]) == 0
    import_hf(tmp_path / "hf", tmp_path / "again")
    capsys.readouterr()
    assert torch.equal(scores(checkpoint, image, capsys), scores(tmp_path / "again", image, capsys))


@pytest.mark.slow
@pytest.mark.distributed
def test_adapters_are_on_the_large_branch_and_the_pyramid_is_trained_whole(setup, tmp_path, capsys):
    root, image = setup, setup / "data" / "0.png"
    checkpoint = trained(root, "adapted", ADAPTED, steps=5)
    stored = tensors(checkpoint)
    adapters = [key for key in stored if ".lora." in key]
    assert any(key.startswith("vision.encoder.") for key in adapters)
    assert not any(key.startswith(NEW) for key in adapters)
    whole = {key for key in stored if ".lora." not in key}
    assert {key.partition(".")[0] for key in whole} == {"vision", "projector"}
    assert all(key.startswith(NEW) for key in whole if key.startswith("vision."))
    assert {key for key in tensors(root / "pyramid") if key.startswith(NEW)} <= whole
    # Another layout continues from it.
    tiny.train(root / "adapted.yaml", [*ADAPTED, "optim.steps=7", "parallel.tp=2"], ranks=2)
    assert len(tiny.curve(root / "adapted")) == 7
    # Merged it answers alike; PEFT has no such model.
    assert main(["export-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert main(["verify-numerics", str(tmp_path / "hf"), str(checkpoint)]) == 0
    import_hf(tmp_path / "hf", tmp_path / "merged")
    capsys.readouterr()
    one, other = (scores(path, image, capsys) for path in (checkpoint, tmp_path / "merged"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert main(["export-hf", str(checkpoint), str(tmp_path / "peft"), "--adapter"]) == 2
    assert "which no model that PEFT can load has" in capsys.readouterr().err
    moved = load_file(tmp_path / "hf" / PYRAMID_FILE)
    before = load_file(root / "pyramid_hf" / PYRAMID_FILE)
    assert any(not torch.equal(before[name], moved[name]) for name in before if "_gamma" in name)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_evaluate_what_one_does(setup, tmp_path):
    checkpoint = trained(setup, "frozen", FROZEN, steps=5)
    records = [
        {
            "id": f"q{number}",
            "image": [f"{number}.png"],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is on page {number}?"},
                {"from": "gpt", "value": "green"},
            ],
        }
        for number in range(4)
    ]
    data = setup / "data" / "eval.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = []
    for name, ranks, sizes in (("one", 1, ()), ("cp", 2, ("--cp", "2")), ("tp", 2, ("--tp", "2"))):
        out = tmp_path / name
        options = ("--out", out, "--max-new-tokens", "3", "--strides", "4")
        done = run_verb("evaluate", checkpoint, "--data", data, *sizes, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(sorted(path.read_text() for path in out.glob("predictions_*.jsonl")))
    assert found[0]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vision.freeze_large_branch=true"], "set vision.tower to piip"),
        ([*FROZEN, "vision.freeze=true"], "vision.freeze to false"),
        (["lora.vision_rank=2"], "set vision.tower to piip"),
        (["vision.tower=internvit"], "config.json has a piip_config"),
        (["optim.vision_layer_decay=0.9"], "not defined for the layers of a pyramid"),
        (["vision.freeze=true", "vision.tower=piip", "lora.vision_rank=2"], "vision.freeze to false"),
        (["vision.freeze=true"], "it would be computed, change nothing and never learn"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_built(setup, capsys, overrides, message):
    config = tiny.run_yaml(
        setup / "refused.yaml",
        checkpoint=setup / "pyramid",
        meta=setup / "data" / "meta.json",
        run_dir=setup / "refused",
    )
    assert main(["train", str(config), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (setup / "refused" / "metrics.jsonl").exists()


def test_a_pyramid_is_asked_for_and_not_there(setup, capsys):
    tiny.import_golden(setup / "no_pyramid")
    config = tiny.run_yaml(
        setup / "missing.yaml",
        checkpoint=setup / "no_pyramid",
        meta=setup / "data" / "meta.json",
        run_dir=setup / "missing",
    )
    assert main(["train", str(config), *FROZEN]) == 2
    assert "config.json has no piip_config" in capsys.readouterr().err
