"""`verify-numerics` as a user meets it: table, exit codes, mistakes. Several ranks: tests/distributed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.cli.main import main
from tests.support.hf_folders import FAMILIES_GOLDEN, GOLDEN, edit_config, edit_weights, golden_copy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "ckpt"
    import_hf(GOLDEN, folder)
    return folder


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = main(["verify-numerics", *map(str, arguments)])
    return (code, *capsys.readouterr())


def test_the_same_weights(capsys, checkpoint):
    code, out, _ = run(capsys, GOLDEN, checkpoint, "--stride", "4", "--every", "2")
    assert code == 0
    stages = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert stages == [
        *("vision.embedding", "vision.layer.2", "vision", "projector"),
        *("decoder.input", "decoder.layer.2", "decoder.norm", "logits"),
    ]
    assert out.splitlines()[-1].startswith("8 of 8 stages pass; largest relative error ")


def test_a_checkpoint_as_the_source_and_json(capsys, checkpoint):
    code, out, _ = run(capsys, checkpoint, checkpoint, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows[-1]["name"] == "logits"
    assert 0 < rows[-1]["relative"] < 1e-5


@pytest.mark.parametrize(
    ("key", "stages"), [("j_qwen3moe_vit300m", "10 of 10"), ("l_gptoss_vit300m", "12 of 12")]
)
def test_a_native_folder_and_the_checkpoint_of_the_other_format(capsys, tmp_path, key, stages):
    """A mixture of experts; the judge reads the names of the other format, through the tables of both."""
    github, native = (FAMILIES_GOLDEN / folder / key for folder in ("ckpt", "ckpt_hf"))
    import_hf(native, tmp_path / "native")
    for source in (github, native, tmp_path / "native"):
        code, out, _ = run(capsys, source, tmp_path / "native")
        assert code == 0, source
        assert out.splitlines()[-1].startswith(f"{stages} stages pass")


def test_other_weights(capsys, checkpoint, tmp_path):
    source = golden_copy(tmp_path / "hf")
    head = load_file(source / "model.safetensors")["language_model.output.weight"]
    edit_weights(source, language_model__output__weight=head * 1.001)
    code, out, _ = run(capsys, source, checkpoint)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "FAIL" in line] == ["logits"]


def test_a_changed_layer_shows_where_it_acts(capsys, checkpoint, tmp_path):
    """One matrix scaled by 1.01: stages before it pass, all after it fail."""
    source = golden_copy(tmp_path / "hf")
    name = "language_model.model.layers.1.feed_forward.w2.weight"
    edit_weights(source, **{name.replace(".", "__"): load_file(source / "model.safetensors")[name] * 1.01})
    code, out, _ = run(capsys, source, checkpoint, "--stride", "4")
    assert code == 1
    failing = [line.split()[0] for line in out.splitlines() if "FAIL" in line]
    assert failing == ["decoder.layer.2", "decoder.norm", "logits"]


def test_nan_is_no_pass(capsys, checkpoint, tmp_path):
    source = golden_copy(tmp_path / "hf")
    edit_weights(source, mlp1__3__bias=torch.full((64,), float("nan")))
    code, out, _ = run(capsys, source, checkpoint)
    assert code == 1
    assert "projector" in next(line for line in out.splitlines() if "FAIL" in line)
    assert "largest relative error nan" in out


def test_another_rope_theta(capsys, checkpoint, tmp_path):
    """Same tensors, another config.json: the comparison of bits knows side files only, this one what they do."""
    source = golden_copy(tmp_path / "hf")
    edit_config(source, llm_config={"rope_theta": 10000})
    code, out, _ = run(capsys, source, checkpoint)
    assert code == 1
    assert "decoder.layer.1" in next(line for line in out.splitlines() if "FAIL" in line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "2"], "torchrun --nproc-per-node 2 -m megatron_v2pe verify-numerics"),
        (["--stride", "17"], "must lie in 1..16"),
        (["--every", "-1"], "--every is -1"),
        (
            ["--reference", "transformers"],
            "transformers has no InternLM2ForCausalLM, only Llama",
        ),
        (["--sp"], "parallel.sequence_parallel is true, but parallel.tp is 1"),
    ],
)
def test_mistakes(capsys, checkpoint, arguments, message):
    code, _, err = run(capsys, GOLDEN, checkpoint, *arguments)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("more", [[], ["--tp", "2", "--sp"]])
def test_the_old_form_names_the_verb(capsys, more):
    """`verify --numerics` of earlier versions, with whatever options it had: one line, before any work."""
    assert main(["verify", *more, "--numerics", "hf", "ckpt"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "megatron-v2pe: verify --numerics is now a verb of its own: megatron-v2pe verify-numerics HF_FOLDER "
        "CHECKPOINT, with the same options"
    )


def test_a_model_of_other_sizes(capsys, checkpoint):
    code, _, err = run(capsys, GOLDEN.parent / "c_qwen2_vit300m", checkpoint)
    assert code == 2
    assert "tile size is 56 in the source and 112 in the checkpoint" in err


def test_transformers_is_optional_and_asked_for_by_name(capsys, tmp_path, monkeypatch):
    source = GOLDEN.parent / "c_qwen2_vit300m"
    import_hf(source, tmp_path / "ckpt")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    code, _, err = run(capsys, source, tmp_path / "ckpt", "--reference", "transformers")
    assert code == 2
    assert "install the extra 'verify', or omit --reference" in err
