"""`prove` as a user starts it: a layout of two ranks is proven, and what cannot be proven is refused.

Strategy: the tiny run of the golden checkpoint on two ranks by default; larger layouts, each with all of its mutations,
experts among them, in the slow tier. Every mutation of the package is caught by one of these layouts.
"""

import json

import pytest

from megatron_v2pe.verification.prove.mutations import MUTATIONS
from tests.support import tiny
from tests.support.hf_folders import FAMILIES_GOLDEN
from tests.support.warm import run_verb

pytestmark = pytest.mark.distributed
TIMEOUT = 560
EXPERTS, GPT_OSS = (FAMILIES_GOLDEN / "ckpt" / key for key in ("j_qwen3moe_vit300m", "l_gptoss_vit300m"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("prove"))


def proof(config, folder, *arguments):
    """The command's end, and the certificate that it wrote."""
    done = run_verb("prove", config, "--out", folder / "certificate.md", *arguments, timeout=TIMEOUT)
    path = folder / "certificate.json"
    return done, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.timeout(600)
def test_two_ranks_are_proven(config, tmp_path):
    done, found = proof(
        config,
        tmp_path,
        "parallel.cp=2",
        "parallel.cp_sharding=by_document",
        "--ranks",
        "2",
        "--tokens",
        "160",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert done.stdout.splitlines()[2].startswith("**PROVEN: ")
    assert done.stdout == (tmp_path / "certificate.md").read_text()
    assert found["is_proven"] is True
    assert found["errors"]["float64"]["gradient"]["error"] < 1e-13
    assert all(each["is_caught"] for each in found["mutations"])
    assert {each["name"] for each in found["mutations"]} >= {
        "positions of another rank",
        "image rows in another order",
        "gradients divided by each rank's own weights",
    }
    assert found["left_out"]["norms without the mark"].startswith("cannot be here: needs sequence")


ROUTED = {"image rows in another order", "no gradients through the router"}
OWN_WEIGHTS = {"gradients divided by each rank's own weights"}
CUT = {
    "labels shifted after the cut",
    "zigzag over the whole row",
    "positions sliced contiguously",
    "positions of another rank",
    "keys get no gradients of other ranks",
    *ROUTED,
    *OWN_WEIGHTS,
}
SPLIT = {"split weights counted on the first tp rank"}
COPIES = {"vision counted once per tp rank"}
LAYOUTS = {
    "cp2": (["parallel.cp=2", "--ranks", "2"], CUT),
    "cp2 dp2, auto": (["parallel.cp=2", "parallel.cp_sharding=auto", "--ranks", "4"], CUT),
    "tp2 sp": (
        ["parallel.tp=2", "parallel.sequence_parallel=true", "--ranks", "2"],
        {"norms without the mark", "vision without the mark", *ROUTED, *SPLIT, *COPIES},
    ),
    "tp2 sp cp4 on 4 ranks, split tower": (
        [
            *("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=4", "parallel.vision=tensor"),
            *("parallel.cp_sharding=by_document", "model.recompute=full", "--ranks", "4"),
        ],
        {
            "norms without the mark",
            "positions of another rank",
            "image rows in another order",
            *SPLIT,
            *OWN_WEIGHTS,
        },
    ),
    "pp2 cp2, frozen tower": (
        ["parallel.pp=2", "parallel.cp=2", "vision.freeze=true", "--ranks", "4"],
        {"positions reversed on later stages", *CUT},
    ),
    "ep2": (
        ["parallel.ep=2", "--ranks", "2"],
        {"gradients of experts summed over all ranks", *OWN_WEIGHTS},
    ),
    "gpt_oss, tp2 sp ep2": (
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "--ranks", "2"],
        {"norms without the mark", *SPLIT},
    ),
}
FOLDERS = {"ep2": EXPERTS, "gpt_oss, tp2 sp ep2": GPT_OSS}


def test_the_layouts_have_every_mutation():
    assert set().union(*(names for _, names in LAYOUTS.values())) == set(MUTATIONS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_proven(config, tmp_path, name):
    arguments, mutations = LAYOUTS[name]
    if name in FOLDERS:
        config = tiny.prepared(tmp_path, hf_folder=FOLDERS[name])
    done, found = proof(config, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    caught = {each["name"] for each in found["mutations"] if each["is_caught"]}
    assert caught == {each["name"] for each in found["mutations"]}
    assert mutations <= caught


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["parallel.tp=2", "parallel.cp=2", "--ranks", "2"],
            "--ranks is 2, but the run's axes at their smallest",
        ),
        (["--tokens", "8"], "--tokens is 8, but"),
        (["--out", "/nowhere/page.md"], "the folder /nowhere does not exist"),
    ],
)
def test_refusals(config, arguments, message):
    done = run_verb("prove", config, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
