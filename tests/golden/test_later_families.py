"""check-golden on the committed cases of InternVL2.5 to 3.5: they pass, and a router's altered number fails alone."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.verification.golden.runner import run_groups, select_groups
from tests.support.hf_folders import FAMILIES_GOLDEN

KEY, CASE = "j_qwen3moe_vit300m", "packed_v2pe"


def rows_of(folder, group):
    return list(run_groups(folder, select_groups(folder, name=group, model_only=False), family=None))


@pytest.mark.parametrize("group", ["text", "model", "generation"])
def test_the_committed_cases_pass(group):
    rows = rows_of(FAMILIES_GOLDEN, group)
    assert [row for row in rows if row.status != "pass"] == []
    assert rows


@pytest.fixture
def copy(tmp_path):
    """The packed case of the mixture of experts alone."""
    shutil.copytree(FAMILIES_GOLDEN / "ckpt" / KEY, tmp_path / "ckpt" / KEY)
    (tmp_path / "forward").mkdir()
    for suffix in ("json", "safetensors"):
        shutil.copy(FAMILIES_GOLDEN / "forward" / f"{KEY}.{suffix}", tmp_path / "forward")
    path = tmp_path / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    values["cases"] = [case for case in values["cases"] if case["name"] == CASE]
    path.write_text(json.dumps(values))
    return tmp_path


def add_to_logits(folder):
    path = folder / "forward" / f"{KEY}.safetensors"
    tensors = load_file(path)
    tensors[f"{CASE}/router_logits_1"][3, 2] += 1e-3
    save_file(tensors, path)


def move_a_token(folder):
    path = folder / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    tokens = values["cases"][0]["tokens_per_expert"]["1"]
    tokens[0], tokens[1] = tokens[0] + 1, tokens[1] - 1
    path.write_text(json.dumps(values))


def add_to_the_loss(folder):
    path = folder / "forward" / f"{KEY}.json"
    values = json.loads(path.read_text())
    losses = values["cases"][0]["aux_loss_per_layer"]
    losses["1" if isinstance(losses, dict) else 1] += 1e-3
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("alter", "quantity"),
    [
        (add_to_logits, "router_logits_1"),
        (move_a_token, "tokens_per_expert_1"),
        (add_to_the_loss, "aux_loss_per_layer"),
    ],
    ids=["logits", "tokens", "loss"],
)
def test_one_altered_number_of_a_router_fails(copy, alter, quantity):
    alter(copy)
    failed = [row for row in rows_of(copy, "model") if row.status == "fail"]
    assert [(row.name, row.quantity) for row in failed] == [(f"model/{KEY}/{CASE}", quantity)]
