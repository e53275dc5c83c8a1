"""A checkpoint whose small files run code when they are unpickled: every verb that opens it refuses, nothing is run."""

import shutil

import pytest

from megatron_v2pe.cli.main import main
from tests.support import tiny
from tests.support.hostile import seal, trap_common, trap_metadata
from tests.support.warm import run_verb


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    return tiny.prepared(root), root / "checkpoint"


@pytest.fixture
def hostile(imported, tmp_path):
    """A checkpoint with a trap and right hashes, and the folder that appears when the trap springs."""
    folder, marker = tmp_path / "ckpt", tmp_path / "sprung"
    shutil.copytree(imported[1], folder)
    trap_metadata(folder, marker)
    seal(folder)
    return folder, marker


@pytest.mark.parametrize("verb", ["export-hf", "verify"])
def test_conversions_do_not_run_it(hostile, tmp_path, capfd, verb):
    folder, marker = hostile
    arguments = {"export-hf": [folder, tmp_path / "out"], "verify": [tiny.GOLDEN_HF, folder]}[verb]
    assert main([verb, *map(str, arguments)]) == 2
    assert "which no checkpoint needs" in capfd.readouterr().err
    assert not marker.exists()


def test_generate_does_not_run_it(hostile):
    folder, marker = hostile
    done = run_verb("generate", folder, "Hello", "--dtype", "float32", "--max-new-tokens", "1")
    assert (done.returncode, "which no checkpoint needs" in done.stderr) == (2, True), done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_train_does_not_run_it(imported, hostile, tmp_path, verify):
    folder, marker = hostile
    overrides = [
        f"model.checkpoint={folder}",
        f"runtime.run_dir={tmp_path / 'run'}",
        f"checkpoint.verify={verify}",
    ]
    done = run_verb("train", imported[0], *overrides)
    assert (done.returncode, "which no checkpoint needs" in done.stderr) == (2, True), done.stderr
    assert not marker.exists()


def test_train_does_not_run_plain_values_that_are_more(imported, tmp_path):
    folder, marker = tmp_path / "ckpt", tmp_path / "sprung"
    shutil.copytree(imported[1], folder)
    trap_common(folder, marker)
    seal(folder)
    done = run_verb("train", imported[0], f"model.checkpoint={folder}", f"runtime.run_dir={tmp_path / 'run'}")
    assert (done.returncode, "more than plain values" in done.stderr) == (2, True), done.stderr
    assert not marker.exists()
