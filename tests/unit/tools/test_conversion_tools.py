"""hf_to_megatron, megatron_to_hf, inspect_checkpoint: as a user runs them, and what they call in the package."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.listing import (
    differences,
    find_checkpoint,
    matching,
    open_folder,
    stats_of,
)
from megatron_v2pe.cli.main import main as cli
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.verification.bits import verify, weights_sha256
from tests.support.hf_folders import GOLDEN, edit_config, edit_weights, folder_bytes, golden_copy

TOOLS = Path(__file__).parents[3] / "tools"
W1 = "language_model.model.layers.0.feed_forward.w1.weight"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool's file as a script, in this process: (exit code, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(TOOLS))  # as Python does for a script

    def call(name, *arguments):
        path = str(TOOLS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def ckpt(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def start(name, *arguments):
    command = [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_there_and_back_as_scripts(tmp_path):
    """Three processes: import with target sizes, export with a comparison, inspect both."""
    sizes = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    done = start("hf_to_megatron", "--load-dir", GOLDEN, "--save-dir", tmp_path / "ckpt", *sizes)
    assert done.returncode == 0, done.stderr
    assert "272,832 parameters" in done.stdout
    assert f"model.checkpoint={tmp_path / 'ckpt'} parallel.tp=2 parallel.pp=2" in done.stdout
    assert read_info(tmp_path / "ckpt").target_layout == {"tp": 2, "pp": 2}
    done = start(
        "megatron_to_hf", "--load-dir", tmp_path / "ckpt", "--save-dir", tmp_path / "back", "--check"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("equal\n")
    assert folder_bytes(tmp_path / "back") == folder_bytes(GOLDEN)
    done = start("inspect_checkpoint", tmp_path / "ckpt", GOLDEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "55 tensors" in done.stdout
    assert done.stdout.endswith("equal, bit for bit\n")


def test_target_sizes_are_checked_and_change_no_tensor(tool, tmp_path):
    code, _, err = tool(
        "hf_to_megatron",
        "--load-dir",
        GOLDEN,
        "--save-dir",
        tmp_path / "a",
        "--target-tensor-parallel-size",
        3,
    )
    assert code == 2
    assert "parallel.tp is 3, but must divide the 4 attention heads" in err
    assert "--target-tensor-" in err
    assert not (tmp_path / "a").exists()
    pipeline = ["--target-pipeline-parallel-size", 4]
    code, _, err = tool("hf_to_megatron", "--load-dir", GOLDEN, "--save-dir", tmp_path / "a", *pipeline)
    assert code == 2
    assert "must divide the 2 decoder layers" in err
    for name, more in (("one", []), ("two", ["--target-tensor-parallel-size", 2])):
        assert tool("hf_to_megatron", "--load-dir", GOLDEN, "--save-dir", tmp_path / name, *more)[0] == 0
    one, two = (folder_bytes(tmp_path / name) for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"checkpoint.json"}


def test_flags_of_other_converters_are_refused_with_the_reason(tool, tmp_path):
    common = ["--load-dir", GOLDEN, "--save-dir", tmp_path / "a"]
    code, _, err = tool("hf_to_megatron", *common, "--model-type", "GPT", "--loader=llama_mistral")
    assert code == 2
    assert "--model-type has no use here: the architecture is read from config.json" in err
    assert "--loader has no use here" in err
    code, _, err = tool("megatron_to_hf", *common, "--target-tensor-parallel-size", "1")
    assert code == 2
    assert "a Hugging Face folder has no parallel layout" in err


def test_cast_on_import(tool, tmp_path):
    assert tool("hf_to_megatron", "--load-dir", GOLDEN, "--save-dir", tmp_path / "a", "--bf16")[0] == 0
    dtypes = {info.dtype for info in open_folder(tmp_path / "a").tensors.values()}
    assert dtypes == {torch.bfloat16}


def test_a_run_means_its_newest_checkpoint(tool, tmp_path, ckpt):
    steps = tmp_path / "run" / "checkpoints"
    steps.mkdir(parents=True)
    ckpt.rename(steps / "step_00000002")
    import_hf(GOLDEN, steps / "step_00000001")
    (steps / "latest").write_text("step_00000002\n")
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(steps) == steps / "step_00000002"
    target = ["--save-dir", tmp_path / "out", "--force", "--max-shard-size", "300KB", "--check"]
    code, out, _ = tool("megatron_to_hf", "--load-dir", tmp_path / "run", *target)
    assert code == 0
    assert "exported from" in out
    assert "step_00000002" in out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    code, out, _ = tool("megatron_to_hf", "--load-dir", tmp_path / "run", "--iteration", 1, *target)
    assert code == 0
    assert "step_00000001" in out
    (steps / "latest").write_text("step_00000009\n")
    with pytest.raises(
        CheckpointError, match="step_00000009, which is no checkpoint; name one yourself: step_00000001"
    ):
        find_checkpoint(tmp_path / "run")


def test_listing_of_state_keys_and_of_hf_names(tool, ckpt):
    code, out, _ = tool("inspect_checkpoint", ckpt, "--filter", "linear_fc1.weight", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["checkpoint"]["family"] == "internlm2_vit300m"
    (row,) = [
        row for row in report["tensors"] if row["name"] == "language.decoder.layers.0.mlp.linear_fc1.weight"
    ]
    assert row == {"name": row["name"], "dtype": "float32", "shape": [256, 64], "bytes": 256 * 64 * 4}
    code, out, _ = tool("inspect_checkpoint", ckpt, "--hf-names", "--filter", "*.w1.weight", "--stats")
    assert code == 0
    whole = load_file(GOLDEN / "model.safetensors")[W1].double()
    assert f"{whole.min():.4g} .. {whole.max():.4g}  mean {whole.mean():.4g}  nan 0  inf 0" in out
    assert "2 of 55 tensors" in out
    code, _, err = tool("inspect_checkpoint", ckpt, "--filter", "nothing")
    assert code == 2
    assert "--filter 'nothing' matches none of the 53 tensors" in err


def test_one_hash_for_folder_import_and_verify(tool, ckpt, capsys):
    """The digest does not depend on how tensors lie in files, and is what verify prints, also as json."""
    _, first, _ = tool("inspect_checkpoint", GOLDEN, "--sha256")
    _, second, _ = tool("inspect_checkpoint", ckpt, "--hf-names", "--sha256")
    digest = first.rpartition("sha256 ")[2].strip()
    assert second.rpartition("sha256 ")[2].strip() == digest
    tensors = load_file(GOLDEN / "model.safetensors")
    assert weights_sha256(list(reversed(tensors)), tensors.__getitem__) == digest
    assert cli(["verify", str(GOLDEN), str(ckpt), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_equal"] is True
    assert report["source_sha256"] == report["checkpoint_sha256"] == digest
    assert report["num_source"] == report["num_equal"] + len(report["dropped"]) == 55


def test_comparison_names_each_kind_of_difference(tool, ckpt, tmp_path):
    other = golden_copy(tmp_path / "other")
    source = load_file(GOLDEN / "model.safetensors")
    changed = source[W1].clone()
    changed[3, 5] += 0.5
    edit_weights(
        other,
        mlp1__0__bias=None,
        mlp1__0__weight=torch.zeros(7),
        mlp1__1__bias=source["mlp1.1.bias"].bfloat16(),
        extra=torch.zeros(2),
        **{W1.replace(".", "__"): changed},
    )
    code, out, _ = tool("inspect_checkpoint", ckpt, other, "--json")
    report = json.loads(out)
    assert code == 1
    found = {row["name"]: (row["kind"], row["max_abs"]) for row in report["different"]}
    rounding = (source["mlp1.1.bias"] - source["mlp1.1.bias"].bfloat16()).abs().max().item()
    assert found.pop("mlp1.1.bias") == ("dtype", pytest.approx(rounding))
    assert found.pop(W1) == ("values", pytest.approx(0.5, abs=1e-6))
    assert found == {
        "mlp1.0.bias": ("only_first", None),
        "mlp1.0.weight": ("shape", None),
        "extra": ("only_second", None),
    }
    assert report["compared"] == 56
    code, out, _ = tool("inspect_checkpoint", ckpt, other, "--filter", "w2.weight")
    assert (code, out.splitlines()[-1].rpartition(": ")[2]) == (0, "equal, bit for bit")


def test_a_folder_with_problems_is_listed_all_the_same(tool, tmp_path):
    other = golden_copy(tmp_path / "other")
    (other / "model-extra.safetensors").write_bytes(b"")
    index = {
        "metadata": {},
        "weight_map": {"a": "model-extra.safetensors", "mlp1.0.bias": "model.safetensors"},
    }
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, _ = tool("inspect_checkpoint", other)
    assert code == 1
    assert "mlp1.0.bias" in out
    assert "problem: " in out
    assert tool("inspect_checkpoint", tmp_path / "nowhere")[0] == 2


def test_stats_and_differences_of_odd_values(tmp_path):
    odd = torch.tensor([float("nan"), float("inf"), -1.0, 3.0])
    stats = stats_of(odd)
    assert (stats.minimum, stats.maximum, stats.mean, stats.num_nan, stats.num_inf) == (-1.0, 3.0, 1.0, 1, 1)
    assert stats_of(torch.tensor([2, 4])).mean == 3.0
    first, second = (golden_copy(tmp_path / name) for name in ("first", "second"))
    edit_weights(first, mlp1__0__bias=torch.full((256,), float("nan")))
    edit_weights(second, mlp1__0__bias=torch.full((256,), float("nan")))
    both = [open_folder(first), open_folder(second)]
    assert list(differences(*both, ["mlp1.0.bias"])) == []  # the same bits
    assert matching(["ab.c", "ab.d", "x"], "ab") == ["ab.c", "ab.d"]
    assert matching(["ab.c", "ab.d", "x"], "*.d") == ["ab.d"]


def test_verify_accounts_for_tensors_on_either_side(ckpt, tmp_path):
    """A folder with one layer less: what it lacks is named, and counts in the checkpoint's digest alone."""
    other = golden_copy(tmp_path / "other")
    edit_config(other, llm_config={"num_hidden_layers": 1})
    gone = [
        name for name in load_file(GOLDEN / "model.safetensors") if "language_model.model.layers.1." in name
    ]
    edit_weights(other, **{name.replace(".", "__"): None for name in gone})
    report = verify(other, ckpt)
    assert report.different == dict.fromkeys(sorted(gone), "not in the folder")
    assert report.num_equal == report.num_source == 55 - len(gone)
    assert report.checkpoint_sha256 == verify(GOLDEN, ckpt).source_sha256 != report.source_sha256
    assert report.side_files == {"config.json": "differs"}
    assert not report.is_equal
