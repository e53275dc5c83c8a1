"""The PIIP group on the committed cases: one altered number of each kind fails, in the row that it belongs to."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.verification.golden.rows import exit_code
from megatron_v2pe.verification.golden.runner import run_groups, select_groups

FOLDER = Path(__file__).parent / "piip"


def rows_of(folder):
    return list(run_groups(folder, select_groups(folder, name="piip", model_only=False), family=None))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "piip")
    return tmp_path


def failed(folder):
    rows = rows_of(folder)
    assert exit_code(rows) == 1
    return {(row.name, row.quantity) for row in rows if row.status == "fail"}


ALTERED_TENSORS = [
    ("modules", "msda_oblong/output/out", {"outputs"}),
    ("modules", "msda_oblong/inter/sampling_locations", {"inter"}),
    ("modules", "injector_dense/grad/attn.wk.weight", {"grad"}),
    ("modules", "injector_no_norm/grad_input/feat", {"grad"}),
    ("llava", "projector_ln/output/tokens", {"outputs"}),
    ("resize", "resize_deit/output/pos_embed", {"pos_embed"}),
]


@pytest.mark.parametrize(
    ("file", "key", "quantities"), ALTERED_TENSORS, ids=[row[1] for row in ALTERED_TENSORS]
)
def test_one_altered_number_fails(copy, file, key, quantities):
    for other in (copy / "piip").glob("*.json"):  # the other files are whole, and need not run again
        if other.stem != file:
            other.unlink()
    path = copy / "piip" / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[key].view(-1)[3] += 2e-3
    save_file(tensors, path)
    assert failed(copy) == {(f"piip/{file}/{key.split('/')[0]}", quantity) for quantity in quantities}


def alter_loss(case):
    case["loss_float64"] *= 1.0 + 1e-6


def alter_unused(case):
    case["unused"].append("value_proj.bias")


def scale_norm(case):
    case["grad_l2"]["value_proj.weight"] *= 1.001


@pytest.mark.parametrize(
    ("alter", "quantity"),
    [(alter_loss, "loss_float64"), (scale_norm, "grad_l2"), (alter_unused, "unused")],
)
def test_one_altered_fact_fails(copy, alter, quantity):
    for other in (copy / "piip").glob("*.json"):
        if other.stem != "modules":
            other.unlink()
    path = copy / "piip" / "modules.json"
    values = json.loads(path.read_text())
    alter(values["cases"]["msda_oblong"])
    path.write_text(json.dumps(values))
    assert failed(copy) == {("piip/modules/msda_oblong", quantity)}


def test_a_size_that_the_release_never_gave_fails(copy):
    for other in (copy / "piip").glob("*.json"):
        if other.stem != "geometry":
            other.unlink()
    path = copy / "piip" / "geometry.json"
    values = json.loads(path.read_text())
    values["resize"][0][2] += 1
    path.write_text(json.dumps(values))
    assert failed(copy) == {("piip/geometry/resize_128_of_384", "size")}
