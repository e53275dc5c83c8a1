"""Packed V2PE cases of the Qwen2, Llama and Phi-3 families over tensor and pipeline parallel ranks; experts."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.verification.golden.ranks import run_on_local_ranks
from megatron_v2pe.verification.golden.runner import select_groups
from tests.support.hf_folders import FAMILIES_GOLDEN

GOLDEN = Path(__file__).parents[1] / "golden"
KEYS = ("c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m")
CASE = "packed_v2pe"
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One case of each family."""
    root = tmp_path_factory.mktemp("families")
    (root / "forward").mkdir()
    for key in KEYS:
        shutil.copytree(GOLDEN / "ckpt" / key, root / "ckpt" / key)
        values = json.loads((GOLDEN / "forward" / f"{key}.json").read_text())
        values["cases"] = [case for case in values["cases"] if case["name"] == CASE]
        (root / "forward" / f"{key}.json").write_text(json.dumps(values))
        shutil.copy(GOLDEN / "forward" / f"{key}.safetensors", root / "forward")
    return root


@pytest.mark.parametrize(
    "parallel",
    [dict(tp=2, sequence_parallel=True), pytest.param(dict(pp=2), marks=pytest.mark.slow)],
    ids=["tp2 sp", "pp2"],
)
def test_two_ranks(folder, parallel):
    """Tolerances are FORMAT's, as on one rank. The Llama's 3 layers lie unevenly on two stages."""
    groups = select_groups(folder, name="model", model_only=True)
    rows = run_on_local_ranks(folder, groups, family=None, parallel=ParallelConfig(**parallel))
    assert [row for row in rows if row.status != "pass"] == []
    assert {row.name for row in rows} == {f"model/{key}/{name}" for key in KEYS for name in (CASE, "file")}
    assert {row.quantity for row in rows} >= {"logits", "per_token_loss", "mean_loss", "grad_l2", "grad"}


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("j_qwen3moe_vit300m", dict(ep=2, cp=2)),
        pytest.param("l_gptoss_vit300m", dict(ep=2, cp=2), marks=pytest.mark.slow),
        pytest.param("l_gptoss_vit300m", dict(tp=2, sequence_parallel=True), marks=pytest.mark.slow),
        pytest.param("l_gptoss_vit300m", dict(pp=2), marks=pytest.mark.slow),
        pytest.param(
            "l_gptoss_vit300m", dict(tp=2, ep=2, cp=2, sequence_parallel=True), marks=pytest.mark.slow
        ),
    ],
    ids=["qwen3_moe", "gpt_oss", "gpt_oss tp2", "gpt_oss pp2", "gpt_oss on 4 ranks"],
)
def test_experts_on_several_ranks(key, layout):
    """Which expert each token goes to, and the load balancing loss of each layer, among the rest."""
    groups = select_groups(FAMILIES_GOLDEN, name="model", model_only=True)
    parallel = ParallelConfig(**layout)
    rows = run_on_local_ranks(FAMILIES_GOLDEN, groups, family=key, parallel=parallel)
    assert [row for row in rows if row.status != "pass"] == []
    assert {row.quantity for row in rows} >= {"logits", "grad", "tokens_per_expert_1", "aux_loss_per_layer"}
