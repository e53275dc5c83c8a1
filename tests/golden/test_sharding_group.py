"""The committed sharding tables pass, and a table with one altered number fails."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from megatron_v2pe.verification.golden.groups.inputs.sharding import run

FOLDER = Path(__file__).parent
QUANTITIES = ("padded_cu_seqlens", "per_sample_zigzag_index", "zigzag_index", "contiguous_index")


def test_every_case_has_a_row_for_each_table_and_passes():
    rows = list(run(FOLDER, family=None))
    cases = json.loads((FOLDER / "sharding/zigzag.json").read_text())["cases"]
    assert [(row.name, row.quantity) for row in rows] == [
        (case["name"], quantity) for case in cases for quantity in QUANTITIES
    ]
    assert {(row.status, row.error) for row in rows} == {("pass", 0.0)}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_one_altered_number_fails_one_row(tmp_path, quantity):
    shutil.copytree(FOLDER / "sharding", tmp_path / "sharding")
    file = tmp_path / "sharding/zigzag.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(f"/{quantity}"))
    tensors[name].flat[-1] += 1
    save_file(tensors, file)
    failed = [row for row in run(tmp_path, family=None) if row.status != "pass"]
    assert [(f"{row.name}/{row.quantity}", row.error) for row in failed] == [(name, 1.0)]
