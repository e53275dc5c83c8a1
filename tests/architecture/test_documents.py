"""Documents that would rot: generated pages are current, links are alive, verbs explain themselves."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_v2pe.cli.main import VERBS
from megatron_v2pe.parallel.topology import ParallelPlan
from megatron_v2pe.parallel.zigzag import shard_ranges
from megatron_v2pe.v2pe.layout import SampleLayout, pack_layout, text_layout

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])


def run_tool(name, *arguments):
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["make_config_reference", "list_mcore_symbols"])
def test_generated_pages_are_current(name):
    """Of the configuration this also says that every field has a doc string."""
    done = run_tool(name, "--check")
    assert (done.returncode, done.stderr) == (0, ""), f"run: python tools/{name}.py"


def test_every_listed_mcore_symbol_exists():
    gone = []
    for line in (ROOT / "docs" / "mcore_symbols.txt").read_text(encoding="utf-8").splitlines():
        name = line.split()[0]
        if line.startswith("#") or "transformer_engine" in name:
            continue  # mcore's wrappers of Transformer Engine exist only where that is installed
        parent, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(parent), attribute) and importlib.util.find_spec(name) is None:
            gone.append(name)
    assert gone == []


def test_symbols_inside_functions_are_found(tmp_path):
    source = "import os\nimport megatron.core.x\ndef f():\n    from megatron.core.y import z\nfrom torch import nn\n"
    (tmp_path / "module.py").write_text(source)
    done = run_tool("list_mcore_symbols", "--of", tmp_path / "module.py")
    assert done.stdout.split() == ["megatron.core.x", "megatron.core.y.z"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_v2pe", verb, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: megatron-v2pe {verb}" in done.stdout
    description = done.stdout.partition("\n\n")[2]
    assert f"megatron-v2pe {verb} " in f"{description} ".replace("\n", " "), "no example command"


TOOLS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=[tool.name for tool in TOOLS])
def test_every_tool_explains_itself(tool):
    done = subprocess.run(
        [sys.executable, tool, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def anchors(page):
    """Anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_are_alive(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def test_every_page_is_in_the_site():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert [
        page.name for page in sorted((ROOT / "docs").glob("*.md")) if f": {page.name}\n" not in menu
    ] == []


# Words in backticks that look like a path of this repository have to be one.
PATH = re.compile(r"`((?:megatron_v2pe|tools|tests|docs|launch|examples|constraints)/[\w./\-]*[\w/])`")
MADE_LATER = ("examples/quickstart/work",)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_named_files_exist(page):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and not name.startswith(MADE_LATER)] == []


def test_the_architecture_page_uses_real_names():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_v2pe").rglob("*.py"))
    known = set(re.findall(r"\w+", source))
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(.*?\)|\[.*?\])?`", text)
    assert len(named) > 40
    assert sorted({name for name in named if not set(name.split(".")) <= known}) == []


def test_the_architecture_pages_example_is_right():
    layout = SampleLayout(
        num_tokens=30,
        image_starts=np.array([9]),
        num_tiles=np.array([2]),
        strides=np.array([2]),
        tokens_per_tile=4,
    )
    pack = pack_layout(
        [layout, text_layout(12, tokens_per_tile=4)], pad_to_multiple=ParallelPlan(cp=2).pad_to_multiple
    )
    assert pack.cu_seqlens.tolist() == [0, 32, 44]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for rank in range(2):
        ranges = shard_ranges(pack.cu_seqlens, cp=2, cp_rank=rank).tolist()
        written = re.search(rf"rank {rank}: (.*)", page).group(1)
        assert [[int(n) for n in pair] for pair in re.findall(r"\[(\d+), (\d+)\)", written)] == ranges
