"""`recipes`: run files and cluster files that come with the package."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.text_table import text_table

NAME = "recipes"
HELP = """list the run files and cluster files that come with the package, or copy one of them.

Copy a run file, change its paths, and train with it; copy a cluster file, change what is special about your site, and
give it to submit.py, whose place the last line of the list names.

Example: megatron-v2pe recipes internvl2_2b_32k --out run.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("name", nargs="?", default="", help="file to copy, as listed")
    parser.add_argument("--out", default="", metavar="FILE", help="where to; default: the same name here")


def launch_folder() -> Path:
    """launch/ of the clone, or of the installed package."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "launch"
    return inside if inside.is_dir() else package.parent / "launch"


def run(args: argparse.Namespace) -> int:
    """List, or copy one."""
    folder = launch_folder()
    files = {
        path.name: path for kind in ("recipes", "clusters") for path in sorted((folder / kind).iterdir())
    }
    if not args.name:
        rows = [[path.parent.name, name, _summary(path)] for name, path in files.items()]
        sys.stdout.write("\n".join(text_table(["kind", "file", "what it is"], rows, align="<")) + "\n\n")
        sys.stdout.write(
            f"submit to SLURM: python {folder / 'submit.py'} CLUSTER.yaml --nodes N train RUN.yaml\n"
        )
        return 0
    found = [path for name, path in files.items() if args.name in (name, path.stem)]
    if not found:
        raise ConfigError(f"no file {args.name!r}; `megatron-v2pe recipes` lists {len(files)} of them")
    target = Path(args.out or found[0].name)
    if target.exists():
        raise ConfigError(f"{target} exists; give another --out")
    shutil.copyfile(found[0], target)
    sys.stdout.write(f"{target}\n")
    return 0


def _summary(path: Path) -> str:
    """The first comment of a file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return (
        first.lstrip("# ").rstrip(".") if first.startswith("#") else "arguments of submit.py, given as @FILE"
    )
