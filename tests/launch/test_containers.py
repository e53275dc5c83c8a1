"""The image recipes, as far as they can be checked without building: what they copy, install and keep."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_v2pe.cli.main import VERBS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "containers"
FREEZE = """numpy==1.26.4
torch==2.9.0a0+145a3a7bda.nv25.10
torchvision==0.24.0a0
transformer_engine==2.9.0
transformer-engine-torch==2.9.0
pillow==11.0.0
"""


def commands(name):
    """The shell lines of a recipe, a folder's path without blanks around it."""
    text = (FOLDER / name).read_text().replace("\\\n", "")
    if name == "Dockerfile":
        (line,) = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
        return [part.strip() for part in line.split("&&")]
    return [line.strip() for line in text.partition("%post\n")[2].splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["Dockerfile", "megatron_v2pe.def"])
def test_commands_are_valid_shell_and_of_this_package(name):
    found = commands(name)
    for line in found:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    assert found[-1].split()[0] == "megatron-v2pe"
    assert found[-1].split()[1] in VERBS
    (install,) = [line for line in found if line.startswith("pip install")]
    folder, extras = re.search(r'"(/\S+)\[(\S+)\]"', install).groups()
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{extra} = \[", table, re.MULTILINE) for extra in extras.split(","))
    assert folder in (FOLDER / name).read_text().partition(install)[0], "it is copied before it is installed"


def test_both_recipes_make_the_same_image():
    assert commands("Dockerfile") == commands("megatron_v2pe.def")


def test_torch_and_transformer_engine_of_the_base_stay():
    """pip is held to what is installed, or it would replace NVIDIA's torch by one without its Transformer Engine."""
    listing, installing = commands("Dockerfile")[:2]
    grep = listing.partition("|")[2].partition(">")[0].strip()
    kept = subprocess.run(
        ["bash", "-c", grep], input=FREEZE, capture_output=True, text=True, check=True
    ).stdout
    assert kept.splitlines() == FREEZE.splitlines()[:5]
    file = listing.rpartition("> ")[2]
    assert f"-c {file}" in installing


def test_cluster_files_and_recipes_name_each_other():
    for cluster, recipe in (("h100_pyxis.yaml", "Dockerfile"), ("a100_apptainer.yaml", "megatron_v2pe.def")):
        assert f"launch/containers/{recipe}" in (ROOT / "launch" / "clusters" / cluster).read_text()
        assert f"clusters/{cluster}" in (FOLDER / recipe).read_text()


def test_an_image_holds_no_history_and_no_environment():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "build"} <= set(ignored)
