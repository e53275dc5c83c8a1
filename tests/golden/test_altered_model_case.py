"""A model or generation case with one number altered fails, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.verification.golden.runner import run_groups, select_groups

FOLDER = Path(__file__).parent
KEY = "a_internlm2_vit300m"


def rows_of(folder, group):
    return list(run_groups(folder, select_groups(folder, name=group, model_only=False), family=None))


@pytest.fixture
def copy(tmp_path):
    """The checkpoint, one forward case and one generation case."""
    shutil.copytree(FOLDER / "ckpt" / KEY, tmp_path / "ckpt" / KEY)
    for group, name, keep in (("forward", KEY, "v2pe_fix_16"), ("generation", "greedy", "a_0_v2pe_fix")):
        (tmp_path / group).mkdir()
        values = json.loads((FOLDER / group / f"{name}.json").read_text())
        values["cases"] = [case for case in values["cases"] if case["name"] == keep]
        (tmp_path / group / f"{name}.json").write_text(json.dumps(values))
        shutil.copy(FOLDER / group / f"{name}.safetensors", tmp_path / group)
    return tmp_path


def alter(path, name, change):
    tensors = load_file(path)
    tensors[name].view(-1)[0] += change
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("tensor", "change", "quantity"),
    [
        ("v2pe_fix_16/logits", 1e-3, "logits"),
        ("v2pe_fix_16/per_token_loss", 1e-3, "per_token_loss"),
        ("v2pe_fix_16/mean_loss", 1e-3, "mean_loss"),
        ("vision/vit_last_hidden", 1e-3, "vit_last_hidden"),
        ("vision/mlp1_out", 1e-3, "mlp1_out"),
    ],
)
def test_one_altered_number_fails_its_quantity(copy, tensor, change, quantity):
    alter(copy / "forward" / f"{KEY}.safetensors", tensor, change)
    assert {row.quantity for row in rows_of(copy, "model") if row.status == "fail"} == {quantity}


def test_an_altered_gradient_norm_fails(copy):
    path = copy / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    norms = values["cases"][0]["grad_l2"]
    norms["mlp1.1.weight"] *= 1.001
    path.write_text(json.dumps(values))
    failed = [row for row in rows_of(copy, "model") if row.status == "fail"]
    assert [row.quantity for row in failed] == ["grad_l2"]
    assert "mlp1.1.weight" in failed[0].detail


@pytest.mark.parametrize(
    ("tensor", "change", "quantity"),
    [
        ("a_0_v2pe_fix/step_top5_values", 0.005, "step_top5_values"),
        ("a_0_v2pe_fix/new_tokens", 1, "new_tokens"),
    ],
)
def test_an_altered_generation_fails(copy, tensor, change, quantity):
    alter(copy / "generation" / "greedy.safetensors", tensor, change)
    assert {row.quantity for row in rows_of(copy, "generation") if row.status == "fail"} == {quantity}
