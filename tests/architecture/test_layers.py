"""Shape of the code: layers, sizes of functions, ASCII, one reader of the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_v2pe"
MAX_FUNCTION_LINES = 60


def python_files(*folders):
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if "work" not in path.relative_to(ROOT).parts)


CODE = python_files("megatron_v2pe", "tools", "examples")
TESTS = python_files("tests")


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def test_imports_go_one_way():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_functions_stay_small(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", CODE + TESTS, ids=names(CODE + TESTS))
def test_source_is_ascii(path):
    text = path.read_text(encoding="utf-8")
    odd = [f"line {number}: {line}" for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert odd == []


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_the_environment_is_read_in_one_place(path):
    if path == PACKAGE / "core" / "env.py" or PACKAGE not in path.parents:
        return
    readers = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv"))
    ]
    assert readers == [], f"lines {readers}: ask megatron_v2pe.core.env"


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_modules_say_what_they_are(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert doc, "no module docstring"


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_no_unowned_todo_and_no_machine_path(path):
    text = path.read_text(encoding="utf-8")
    for word in ("TODO", "FIXME", "XXX", "/root/", "/work/"):
        assert word not in text, word
