"""Write docs/configuration.md from config/schema.py: `python tools/make_config_reference.py [--check]`.

The doc string under a field is found in the source, because Python itself throws it away.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import typing
from pathlib import Path

from megatron_v2pe.config import schema
from megatron_v2pe.core.files import write_atomic

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
HEADER = """# Configuration

Written by `python tools/make_config_reference.py` from `megatron_v2pe/config/schema.py`; do not edit.

A run is a YAML file with the sections below, and `section.key=value` overrides after it on the command line:

    megatron-v2pe train run.yaml optim.lr=1e-5 parallel.cp=2

Unknown keys are refused. Rules between sections and against the checkpoint are in
`megatron_v2pe/config/validate.py`. The resolved configuration is written beside the run.
"""


def field_docs(section: type) -> dict[str, str]:
    """Doc string under each annotated field of a dataclass; fields without one are left out."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[statement.target.id] = str(below.value.value)
    return docs


def sections() -> dict[str, type]:
    """Sections of a run by name, and the element type of data.curriculum."""
    found = {field.name: field.default_factory for field in dataclasses.fields(schema.RunConfig)}
    return {**found, "data.curriculum[]": schema.CurriculumStage}


def type_text(annotation: object) -> str:
    """How a value may look, in terms of YAML."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return {str: "list of texts", int: "list of integers"}.get(
            typing.get_args(annotation)[0], "list of stages"
        )
    if type(None) in typing.get_args(annotation):
        (given,) = set(typing.get_args(annotation)) - {type(None)}
        return f"{type_text(given)}, `null`"
    return {int: "integer", float: "number", bool: "`true`, `false`", str: "text"}[annotation]


def default_text(value: object) -> str:
    """A default as YAML would have it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "(empty)" if value in ("", ()) else f"`{value}`"


def undocumented() -> list[str]:
    """Fields without a doc string under them."""
    return [
        f"{name}.{field.name}"
        for name, section in sections().items()
        for field in dataclasses.fields(section)
        if not field_docs(section).get(field.name, "").strip()
    ]


def render() -> str:
    """The whole page.

    Raises:
        SystemExit: a field has no doc string.
    """
    if missing := undocumented():
        raise SystemExit(f"config/schema.py: no doc string under {', '.join(missing)}")
    parts = [HEADER]
    for name, section in sections().items():
        hints, docs = typing.get_type_hints(section), field_docs(section)
        parts.append(f"\n## {name}\n\n{inspect.getdoc(section)}\n")
        parts.append("\n| key | values | default | meaning |\n|---|---|---|---|\n")
        for field in dataclasses.fields(section):
            meaning = " ".join(docs[field.name].split()).replace("|", "\\|")
            cells = (f"`{field.name}`", type_text(hints[field.name]), default_text(field.default), meaning)
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def main() -> int:
    """Write the page, or say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the page is out of date")
    if parser.parse_args().check:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != render())
    write_atomic(TARGET, render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
