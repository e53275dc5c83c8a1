"""check-golden on the committed subset: it passes, and a case with one number altered fails."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.verification.golden.rows import exit_code
from megatron_v2pe.verification.golden.runner import GROUPS, run_groups, select_groups

FOLDER = Path(__file__).parent


def rows_of(folder, name):
    return list(run_groups(folder, select_groups(folder, name=name, model_only=False), family=None))


# Of folders in both formats there are none here; test_later_families makes one.
COMMITTED = [group for group in GROUPS if group.name != "formats"]


@pytest.mark.parametrize("group", COMMITTED, ids=[group.name for group in COMMITTED])
def test_the_committed_cases_pass(group):
    if not any(any(FOLDER.glob(pattern)) for pattern in group.files):
        pytest.fail(f"tests/golden has no cases of group {group.name}")
    rows = rows_of(FOLDER, group.name)
    assert [row for row in rows if row.status == "fail"] == []
    assert any(row.status == "pass" for row in rows)


@pytest.fixture
def copy(tmp_path):
    """A copy of the positions folder that a test may alter."""
    shutil.copytree(FOLDER / "positions", tmp_path / "positions")
    return tmp_path


ALTERATIONS = [
    ("exact_next_position", "next_position", lambda case: str(int(case["exact_next_position"]) + 1)),
    ("exact_sha256_float32", "sha256_float32", lambda case: "0" * 64),
    ("exact_runs", "runs", lambda case: [["0", "1", 6], ["1281/256", "1/128", 256], ["7", "1", 8]]),
    ("stride", "runs", lambda case: 2),
    ("segments_rle", "next_position", lambda case: [[1, [["t", 6], ["i", 1]]], [1, [["t", 7]]]]),
]


@pytest.mark.parametrize(("field", "quantity", "change"), ALTERATIONS, ids=[row[0] for row in ALTERATIONS])
def test_one_altered_number_fails(copy, field, quantity, change):
    path = copy / "positions" / "positions.json"
    values = json.loads(path.read_text())
    case = next(case for case in values["cases"] if case["name"] == "one_image_one_tile_s1")
    case[field] = change(case)
    path.write_text(json.dumps(values))
    rows = rows_of(copy, "positions")
    failed = {(row.name, row.quantity) for row in rows if row.status == "fail"}
    assert ("positions/one_image_one_tile_s1", quantity) in failed
    assert {name for name, _ in failed} == {"positions/one_image_one_tile_s1"}
    assert exit_code(rows) == 1


def test_one_altered_padded_position_fails(copy):
    path = copy / "positions" / "positions.json"
    values = json.loads(path.read_text())
    case = next(case for case in values["cases"] if case["flag"] == "padding")
    case["positions"][-1] += 1
    path.write_text(json.dumps(values))
    failed = [row.name for row in rows_of(copy, "positions") if row.status == "fail"]
    assert failed == [f"positions/{case['name']}"]


@pytest.mark.parametrize("table", ["cos64", "sin64", "cos", "sin", "q_rotated"])
def test_one_altered_table_entry_fails(copy, table):
    path = copy / "positions" / "rope_tables.safetensors"
    tensors = load_file(path)
    tensors[f"d16_t1000000/{table}"][3, 1] += 1e-3
    save_file(tensors, path)
    failed = [row for row in rows_of(copy, "rope") if row.status == "fail"]
    assert len(failed) == 1
    assert failed[0].name == "rope/d16_t1000000"
    assert failed[0].error == pytest.approx(1e-3, rel=1e-2)


def test_cases_the_release_gets_wrong_are_met():
    flagged = {
        f"positions/{case['name']}"
        for case in json.loads((FOLDER / "positions" / "positions.json").read_text())["cases"]
        if case["flag"] in ("reference_fails", "reference_inexact")
    }
    rows = [row for row in rows_of(FOLDER, "positions") if row.name in flagged]
    assert len(flagged) > 10
    assert {row.status for row in rows} == {"pass"}


def test_a_folder_without_a_group_gives_no_rows_for_it(copy):
    assert [group.name for group in select_groups(copy, name=None, model_only=False)] == ["positions", "rope"]


@pytest.mark.parametrize(
    ("name", "model_only", "message"),
    [
        ("position", False, "--group is 'position', known groups are positions, rope"),
        ("tiling", False, "holds no cases to run"),
        ("rope", True, "does not run the model"),
        (None, True, "holds no cases to run"),
    ],
)
def test_refused_selections(copy, name, model_only, message):
    with pytest.raises(ConfigError, match=message):
        select_groups(copy, name=name, model_only=model_only)


def test_an_exception_in_a_group_is_a_failed_row_and_the_next_group_runs(copy):
    (copy / "positions" / "positions.json").write_text('{"cases": [{"name": "x"}]}')
    rows = rows_of(copy, None)
    assert rows[0].status == "fail"
    assert (rows[0].name, rows[0].quantity, rows[0].detail) == (
        "positions",
        "exception",
        "KeyError: 'num_image_token'",
    )
    assert {row.status for row in rows[1:]} == {"pass"}


def test_command_line(copy, capsys):
    assert main(["check-golden", str(copy), "--group", "rope"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "15 pass, 0 fail, 0 unsupported"
    assert lines[0].split()[:3] == ["rope/d128_t1000000", "cos", "exact"]
    assert lines[0].split()[-1] == "pass"


def test_command_line_refuses(copy, capsys):
    assert main(["check-golden", str(copy / "none")]) == 2
    assert "none is not a folder" in capsys.readouterr().err
    assert main(["check-golden", str(copy), "--tp", "0"]) == 2
    assert "--tp is 0, but must be at least 1" in capsys.readouterr().err
    assert main(["check-golden", str(copy), "--sp"]) == 2
    assert "parallel.sequence_parallel" in capsys.readouterr().err
    assert main(["check-golden", str(copy), "--family", "z"]) == 2
    assert "--family is 'z'" in capsys.readouterr().err
