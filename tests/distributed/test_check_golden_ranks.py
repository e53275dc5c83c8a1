"""check-golden with parallel flags: it starts its own ranks, and a failed case is not hidden by the launcher."""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden"
KEY = "a_internlm2_vit300m"
KEPT = ("text_only", "default_single")


@pytest.fixture
def folder(tmp_path):
    """Two forward cases, of which default_single has one altered logit."""
    shutil.copytree(GOLDEN / "ckpt" / KEY, tmp_path / "ckpt" / KEY)
    (tmp_path / "forward").mkdir()
    values = json.loads((GOLDEN / "forward" / f"{KEY}.json").read_text())
    values["cases"] = [case for case in values["cases"] if case["name"] in KEPT]
    (tmp_path / "forward" / f"{KEY}.json").write_text(json.dumps(values))
    tensors = load_file(GOLDEN / "forward" / f"{KEY}.safetensors")
    tensors["default_single/logits"][-1, 3] += 0.01
    save_file(tensors, tmp_path / "forward" / f"{KEY}.safetensors")
    return tmp_path


@pytest.mark.distributed
def test_two_context_parallel_ranks(folder, capfd):
    code = main(["check-golden", str(folder), "--cp", "2"])
    lines = capfd.readouterr().out.splitlines()
    failed = [line.split()[:2] for line in lines if re.search(r"\d  fail\b", line)]
    assert failed == [[f"model/{KEY}/default_single", "logits"]]
    assert code == 1
    passed = [line for line in lines if re.search(r"\d  pass\b", line)]
    assert {line.split()[0] for line in passed} == {f"model/{KEY}/{name}" for name in (*KEPT, "file")}
    assert lines[-1] == f"{len(passed)} pass, 1 fail, 0 unsupported"


@pytest.mark.distributed
def test_generation_over_context_parallel_ranks(capfd):
    assert main(["check-golden", str(GOLDEN), "--group", "generation", "--family", "a", "--cp", "2"]) == 0
    assert re.search(r"\d+ pass, 0 fail, 0 unsupported$", capfd.readouterr().out.strip())
