"""Tables as text."""

from megatron_v2pe.core.text_table import text_table


def test_first_column_left_and_numbers_right() -> None:
    lines = text_table(["name", "tokens", "x"], [["a", "1,024", "2"], ["longer", "7", "1.5"]])
    assert lines == ["name    tokens    x", "a        1,024    2", "longer       7  1.5"]


def test_no_header_indent_and_short_rows() -> None:
    assert text_table(None, [["a", "10"], ["total"], ["b", "7", "x"]], indent="  ") == [
        "  a      10",
        "  total",
        "  b       7  x",
    ]


def test_alignment_of_each_column_and_no_trailing_blanks() -> None:
    assert text_table(["n", "what"], [["10", "a"], ["7", "left"]], align="><") == [
        " n  what",
        "10  a",
        " 7  left",
    ]


def test_dashes_are_as_wide_as_the_table() -> None:
    assert text_table(["stride", "1K"], [None, ["1", "0.5"]]) == ["stride   1K", "-----------", "1       0.5"]


def test_a_table_without_rows() -> None:
    assert text_table(None, []) == []
    assert text_table(["a", "b"], []) == ["a  b"]
