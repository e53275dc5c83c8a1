"""Answers straight from a Hugging Face folder are those of its import; nothing is stored."""

import json

import pytest

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.model_source import is_hf_folder, require_source, source_digest
from megatron_v2pe.cli.main import main
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from tests.support.hf_folders import edit_config, golden_copy


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path / "hf")


def test_generate_and_evaluate(folder, tmp_path, capsys):
    edit_config(folder, rope_pos_id_version="v2pe_fix", rope_pos_id_stride=4)
    import_hf(folder, tmp_path / "ckpt")
    before = sorted(path.name for path in folder.rglob("*"))
    question = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    answers, rows = [], []
    for source in (folder, tmp_path / "ckpt"):
        assert main(["generate", str(source), "Hello", "--max-new-tokens", "5", "--dtype", "float32"]) == 0
        found = capsys.readouterr()
        answers.append(found.out)
        assert "stride 4 of 16, which this checkpoint was trained with" in found.err
        out = tmp_path / f"out_{source.name}"
        assert main(["evaluate", str(source), "--data", str(tmp_path / "q.jsonl"), "--out", str(out)]) == 0
        capsys.readouterr()
        rows.append((out / "predictions_4.jsonl").read_text())
    assert answers[0] == answers[1]
    assert rows[0] == rows[1]
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_changed_folder_is_another_model(folder):
    before = source_digest(folder)
    assert source_digest(folder) == before
    edit_config(folder, template="Hermes-2")
    assert source_digest(folder) != before


def test_what_is_neither(folder, tmp_path):
    assert is_hf_folder(folder)
    with pytest.raises(ConfigError, match="holds no hashes"):
        require_source(folder, verify="full")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Hugging Face folder"):
        require_source(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--base"):
        require_source(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        require_source(tmp_path / "nothing")


def test_a_damaged_folder_is_refused_at_the_door(folder):
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert main(["generate", str(folder), "Hello"]) == 2
