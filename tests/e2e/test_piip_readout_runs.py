"""LLaVA's readout from the command line: other tokens per tile in packs and prompts; trained, exported, refused."""

import json

import pytest
import torch

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.cli.main import main
from tests.e2e.test_piip_runs import tensors
from tests.support import tiny
from tests.support.piip import pyramid_checkpoint

TOKENS = 25
LLAVA = {"readout": "llava", "readout_grid": 5}
PARTS = ("projector.merge.", "vision.branches.", "vision.interactions.", "vision.encoder.")


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("piip_readout")
    pyramid_checkpoint(root / "pyramid", **LLAVA)
    tiny.make_data(root / "data")
    return root


def run_file(root, name, checkpoint=None):
    return tiny.run_yaml(
        root / f"{name}.yaml",
        checkpoint=checkpoint or root / "pyramid",
        meta=root / "data" / "meta.json",
        run_dir=root / name,
    )


def trained(root, name, overrides=(), *, steps=5):
    if not (root / name).exists():
        tiny.train(run_file(root, name), [*overrides, f"optim.steps={steps}"])
    return step_path(root / name, steps)


def scores(checkpoint, capsys, *options):
    ask = ["generate", str(checkpoint), "What is it?", "--dtype", "float32", *map(str, options)]
    assert main([*ask, "--score", "a small red square"]) == 0
    return torch.tensor([json.loads(line)["logprob"] for line in capsys.readouterr().out.splitlines()])


def test_prompts_have_the_tokens_of_the_readout_and_text_is_as_before(setup, capsys):
    """Prefill chunks shorter than a tile, at a stride of 3/25; without images the plain model to the bit."""
    tiny.import_golden(setup / "plain")
    image = ("--image", setup / "data" / "0.png", "--stride", 3)
    whole = scores(setup / "pyramid", capsys, *image)
    in_chunks = scores(setup / "pyramid", capsys, *image, "--chunk-tokens", TOKENS // 3)
    torch.testing.assert_close(in_chunks, whole, rtol=1e-4, atol=1e-5)
    other_stride = scores(setup / "pyramid", capsys, *image[:2], "--stride", TOKENS)
    assert (other_stride - whole).abs().max() > 1e-4
    assert torch.equal(scores(setup / "plain", capsys), scores(setup / "pyramid", capsys))
    ask = ["generate", str(setup / "pyramid"), "What is it?", "--image", str(setup / "data" / "0.png")]
    assert main([*ask, "--stride", str(TOKENS + 1)]) == 2
    assert f"1..{TOKENS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.freeze_projector=true"], "is as add-piip made it: random"),
        (
            ["lora.projector_rank=2"],
            "readout (llava) is a projector that starts at random and has no adapters",
        ),
        ([f"position.stride={TOKENS + 1}", "position.mode=v2pe_fixed"], f"must lie in 1..{TOKENS}"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_built(setup, capsys, overrides, message):
    assert main(["train", str(run_file(setup, "refused")), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (setup / "refused" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_packs_metrics_and_a_trained_readout(setup, tmp_path, capsys):
    checkpoint = trained(setup, "whole")
    lines = tiny.metrics(setup / "whole")
    assert all(line["visual_tokens"] == TOKENS * line["tiles"] for line in lines)
    assert all(line["stride_max"] <= 16 for line in lines), "powers of two up to 25"
    shares = lines[-1]["flops_share_by_branch"]
    assert set(shares) == {"large", "branch_1", "branch_2", "interactions", "readout"}
    assert all(0 < share < 1 for share in shares.values())
    before, after = tensors(setup / "pyramid"), tensors(checkpoint)
    for part in PARTS:
        moved = [key for key in before if key.startswith(part) and not torch.equal(before[key], after[key])]
        assert moved, part
    # A readout that was trained may be frozen.
    again = [
        f"model.checkpoint={checkpoint}",
        f"runtime.run_dir={tmp_path / 'run'}",
        "model.freeze_projector=true",
    ]
    tiny.train(run_file(setup, "whole"), [*again, "optim.steps=2", "optim.warmup_steps=1"])
    kept = tensors(step_path(tmp_path / "run", 2))
    assert all(torch.equal(kept[key], after[key]) for key in after if key.startswith("projector."))
    # Out, in again: the same answers, and the second implementation agrees.
    assert main(["export-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(checkpoint)]) == 0
    assert main(["verify-numerics", str(tmp_path / "hf"), str(checkpoint)]) == 0
    import_hf(tmp_path / "hf", tmp_path / "again")
    capsys.readouterr()
    image = ("--image", setup / "data" / "0.png", "--stride", 4)
    assert torch.equal(scores(checkpoint, capsys, *image), scores(tmp_path / "again", capsys, *image))


@pytest.mark.slow
def test_the_first_stage_trains_the_readout_alone(setup):
    """LLaVA's first stage: towers and language model frozen, gates zero: allowed, as each branch is read."""
    checkpoint = trained(
        setup, "stage1", ["vision.freeze=true", "model.freeze_language=true", "optim.lr=1e-2"], steps=3
    )
    before, after = tensors(setup / "pyramid"), tensors(checkpoint)
    # A run pads the vocabulary.
    moved = {key for key, tensor in before.items() if not torch.equal(tensor, after[key][: len(tensor)])}
    assert moved == {key for key in before if key.startswith("projector.")}
