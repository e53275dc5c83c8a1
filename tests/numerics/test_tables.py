"""The tables of docs/numerics.md: marks that `measure` finds, every row there, rows written without touching prose."""

import pytest

from tests.numerics import measure, tables
from tests.numerics.test_mutations import VARIANTS

HEADER = ["name", "error"]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    table = "| name | error |\n| --- | --- |\n| a | 1 |\n| b | 2 |"
    path.write_text(f"before\n{tables.mark('one')}\n{table}\n{tables.END}\nafter\n")
    return path


def test_a_table_is_replaced_and_the_text_around_it_stays(page):
    tables.write("one", HEADER, [["c", "5e-8"]], page=page)
    assert tables.read("one", page=page) == {"c": ["c", "5e-8"]}
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-2:]) == ("before", [tables.END, "after"])


def test_rows_that_were_not_measured_stay(page):
    tables.write("one", HEADER, [["b", "7"]], order=["a", "b", "c"], page=page)
    assert tables.read("one", page=page) == {"a": ["a", "1"], "b": ["b", "7"]}


def test_wrong_tables_are_refused(page):
    with pytest.raises(ValueError, match="no table 'two'"):
        tables.write("two", HEADER, [], page=page)
    with pytest.raises(ValueError, match="1 cells, but the header has 2"):
        tables.write("one", HEADER, [["a"]], page=page)


@pytest.mark.parametrize("name", measure.TABLES)
def test_the_documentation_has_the_table(name):
    header = measure.TABLES[name].header
    rows = tables.read(name)
    assert rows
    assert all(len(row) == len(header) for row in rows.values())
    missing = set(measure.TABLES[name].order or ()) - set(rows)
    assert missing == set()


def test_the_documentation_has_every_variant():
    assert list(tables.read("variants")) == list(VARIANTS)


def test_figures_have_two_digits():
    figures = [tables.figure(error) for error in (0.0, 5.56e-8, 1.0e-5, 2.3e-1, 1.6)]
    assert figures == ["0", "5.6e-8", "1.0e-5", "2.3e-1", "1.6"]
