"""A run that version 0.1.0 made is read by this one: resumed to the same losses, evaluated, exported.

recorded/run_0_1_0.tar.xz holds an imported checkpoint, the folder of a run that was stopped after 2 of 4 steps
(language model and vision tower frozen), its YAML file, and the whole curve of the run that was not stopped.
"""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.retention import step_path
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.verification.bits import verify
from tests.support import tiny
from tests.support.warm import run_verb

ARCHIVE = Path(__file__).parent / "recorded" / "run_0_1_0.tar.xz"
FOLDER_MARK = "@FOLDER@"  # in the archive's text files, for the folder that it is unpacked into
OLD_LIMIT = "data.max_image_pixels=178956970"  # the default of that version
OVERRIDES = [
    "model.freeze_language=true",
    "vision.freeze=true",
    "checkpoint.save_every=2",
    "optim.steps=4",
    "optim.warmup_steps=1",
]


def sign(path):
    """Make a checkpoint.json fit its own SHA-256 after an edit: of its other values as compact json in key order."""
    values = json.loads(path.read_text())
    del values["sha256_of_this"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**values, "sha256_of_this": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The unpacked archive beside the data that it was trained on."""
    parent = tmp_path_factory.mktemp("recorded")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(parent, filter="data")
    root = parent / "rec"
    for pattern in ("run.yaml", "run/config.yaml", "run/**/checkpoint.json", "run/data_cache/*/*/facts.json"):
        for path in root.glob(pattern):
            path.write_text(path.read_text().replace(FOLDER_MARK, str(root)))
    sign(root / "run" / "checkpoints" / "step_00000002" / "checkpoint.json")
    tiny.make_data(root / "data")
    return root


@pytest.fixture
def checkpoint(recorded):
    return step_path(recorded / "run", 2)


def test_its_settings_and_state_load(recorded, checkpoint):
    assert load_run_config(recorded / "run" / "config.yaml") == load_run_config(
        recorded / "run.yaml", [*OVERRIDES, OLD_LIMIT]
    )
    info = read_info(checkpoint, verify="full")
    state = RunState.from_json(info.run_state)
    assert (state.step, state.consumed_packs, state.position_mode) == (2, 4, "v2pe_random")


def test_it_continues_with_the_losses_that_it_would_have_had(recorded, tmp_path):
    """Same topology and operations; 1e-6 relative allows for another build of torch on another processor."""
    shutil.copytree(recorded / "run", tmp_path / "run")
    # The index has another format since, and templates hash otherwise: the plan is made anew, and is the same.
    again = [OLD_LIMIT, "checkpoint.allow_changed_data=true", f"runtime.run_dir={tmp_path / 'run'}"]
    log = tiny.train(recorded / "run.yaml", [*OVERRIDES, *again])
    assert "resumed from" in log
    assert "at step 2" in log
    lines = tiny.metrics(tmp_path / "run")
    wanted = json.loads((recorded / "curve.json").read_text())
    assert [line["data_digest"] for line in lines] == [digest for _, _, digest in wanted]
    assert set(lines[0]) <= set(lines[-1])  # one line of either version; fields may have been added
    for line, (loss, grad_norm, _) in zip(lines, wanted, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-6)


def test_its_checkpoint_is_evaluated(checkpoint, tmp_path):
    question = {
        "id": "q",
        "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "green"}],
        "length": 10,
        "depth": 0.5,
    }
    data, out = tmp_path / "eval.jsonl", tmp_path / "out"
    data.write_text(json.dumps(question) + "\n")
    done = run_verb(
        "evaluate", checkpoint, "--data", data, "--out", out, "--max-new-tokens", "8", "--strides", "default"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, answer),) = read_jsonl(out / "predictions_default.jsonl")
    assert answer["id"] == "q"


def test_its_checkpoint_is_exported(checkpoint, tmp_path):
    """To a folder that holds what the checkpoint does: imported again, it verifies bit for bit."""
    done = run_verb("export-hf", checkpoint, tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    assert verify(tmp_path / "hf", checkpoint).is_equal
    import_hf(tmp_path / "hf", tmp_path / "again")
    assert verify(tmp_path / "hf", tmp_path / "again").is_equal
