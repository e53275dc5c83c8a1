"""Write docs/mcore_symbols.txt: `python tools/list_mcore_symbols.py [--check | --of FILE]`.

megatron-core moves fast. The list shows at a glance which of its symbols an upgrade has to keep, and in
which file of ours each is touched.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from megatron_v2pe.core.files import write_atomic

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "mcore_symbols.txt"
HEADER = "# megatron.core symbols and where they are imported; written by tools/list_mcore_symbols.py\n"


def imported_symbols(source: str) -> set[str]:
    """Dotted names below megatron.core that a module's source imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name == "megatron.core" or name.startswith("megatron.core.")}


def render() -> str:
    """One line per symbol: the symbol, then the files of the package that import it."""
    users: dict[str, list[str]] = {}
    for path in sorted((ROOT / "megatron_v2pe").rglob("*.py")):
        for name in imported_symbols(path.read_text(encoding="utf-8")):
            users.setdefault(name, []).append(path.relative_to(ROOT / "megatron_v2pe").as_posix())
    return HEADER + "".join(f"{name}  {' '.join(files)}\n" for name, files in sorted(users.items()))


def main() -> int:
    """Write the list, or say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the list is out of date")
    parser.add_argument("--of", type=Path, metavar="FILE", help="print the symbols of one file instead")
    options = parser.parse_args()
    if options.of:
        print("\n".join(sorted(imported_symbols(options.of.read_text(encoding="utf-8")))))
        return 0
    if options.check:
        return int(not TARGET.exists() or TARGET.read_text(encoding="utf-8") != render())
    write_atomic(TARGET, render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
