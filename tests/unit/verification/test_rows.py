"""Verdicts, report lines and exit codes of check-golden."""

import pytest

from megatron_v2pe.verification.golden.rows import (
    Row,
    compared,
    equal,
    exit_code,
    format_counts,
    format_row,
    unsupported,
)

PASS = compared("model/a", "logits", error=1e-5, tolerance=1e-4)
FAIL = compared("model/b", "logits", error=2e-4, tolerance=1e-4)
CANNOT = unsupported("model/c", "logits", reason="Qwen2 is not supported yet")


def test_verdicts():
    assert (PASS.status, FAIL.status, CANNOT.status) == ("pass", "fail", "unsupported")
    assert compared("x", "y", error=1e-4, tolerance=1e-4).status == "pass"
    assert compared("x", "y", error=float("nan"), tolerance=1.0).status == "fail"
    assert equal("x", "ids", is_equal=True, detail="no") == Row("x", "ids", 0.0, 0.0, "pass")
    assert equal("x", "ids", is_equal=False, detail="7 for 8") == Row(
        "x", "ids", None, 0.0, "fail", "7 for 8"
    )


@pytest.mark.parametrize(
    ("rows", "code"), [([], 0), ([PASS], 0), ([PASS, CANNOT], 2), ([PASS, FAIL], 1), ([CANNOT, FAIL], 1)]
)
def test_exit_codes(rows, code):
    assert exit_code(rows) == code


def test_lines():
    assert format_row(PASS).split() == ["model/a", "logits", "1.000e-05", "1.0e-04", "pass"]
    assert format_row(CANNOT).split(maxsplit=5)[2:] == ["-", "-", "unsupported", "Qwen2 is not supported yet"]
    assert format_counts([PASS, PASS, FAIL, CANNOT]) == "2 pass, 1 fail, 1 unsupported"
