"""The PIIP example: its options, its pieces, and the whole script in a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_v2pe.checkpoint.convert.add_pyramid import add_pyramid
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.load import load_run_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "piip"


def script(*options, timeout=500):
    return subprocess.run(
        ["bash", "examples/piip/run.sh", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stesp", "3"], "unknown option '--stesp'"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "must be whole numbers of at least 1"),
        (["--seeds", "a"], "--seeds is 'a'"),
        (["--models", "piip,deeper"], "must be of plain, deep, pixels, piip and llava"),
    ],
)
def test_bad_options_exit_with_two(options, message):
    done = script(*options, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


def tool(name, *arguments):
    subprocess.run([sys.executable, EXAMPLE / name, *map(str, arguments)], check=True, timeout=120)


def test_models_differ_in_their_tower_only(tmp_path):
    """Folders that the package reads, 16 tokens a picture in each; equal names and shapes have equal numbers."""
    from safetensors.numpy import load_file

    golden = ROOT / "tests" / "golden" / "ckpt" / "a_internlm2_vit300m"
    tool("make_models.py", tmp_path, "--quickstart", golden, "--seed", 3)
    for name, recipe in (("piip", "pyramid.yaml"), ("llava", "readout_llava.yaml")):
        add_pyramid(tmp_path / "plain", tmp_path / recipe, tmp_path / name)
    models = ("plain", "deep", "pixels", "piip", "llava")
    assert [read_architecture(tmp_path / name).tokens_per_tile for name in models] == [16] * 5
    assert read_architecture(tmp_path / "piip").tile_sizes == (8, 32)
    assert [read_architecture(tmp_path / name).reads_all_branches for name in models] == [False] * 4 + [True]
    plain, pixels = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "pixels"))
    shared = [name for name in plain if name.startswith("language_model.")]
    assert len(shared) > 10
    assert all(np.array_equal(plain[name], pixels[name]) for name in shared)
    assert load_run_config(EXAMPLE / "train.yaml", []).optim.steps == 500


def test_pictures_show_one_digit_and_no_digit_is_in_both_splits(tmp_path):
    tool("make_data.py", tmp_path, "--train", 40, "--eval", 40)
    seen = {}
    for split in ("train", "eval"):
        records = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert len(records) == 40
        digits = []
        for record in records:
            grey = np.asarray(Image.open(tmp_path / record["image"]))
            assert grey.shape == (32, 32)
            places = grey.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
            (place,) = np.flatnonzero(places.any(axis=1))
            digits.append(places[place].tobytes())
            assert record["conversations"][1]["value"] in "0123456789"
        seen[split] = set(digits)
    assert not seen["train"] & seen["eval"]
    assert json.loads((tmp_path / "train_meta.json").read_text())["digits"]["length"] == 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_nothing_to_table_and_picture(tmp_path):
    """Two steps of three models: it does not learn, but every part runs, and a second call has nothing left to do."""
    options = [
        "--steps",
        "2",
        "--seeds",
        "0",
        "--models",
        "plain,piip,llava",
        "--pictures",
        "60",
        "--work",
        str(tmp_path),
    ]
    first = script(*options)
    assert first.returncode == 0, first.stderr[-3000:]
    table = (tmp_path / "piip.txt").read_text()
    assert "PIIP, 8 and 32 px" in table
    rows = [line.split(",") for line in (tmp_path / "piip.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["plain", "piip", "llava"]
    assert float(rows[2][1]) > float(rows[1][1]) > 1.5 * float(rows[0][1]) > 1
    assert (tmp_path / "piip.png").stat().st_size > 5000
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = script(*options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
