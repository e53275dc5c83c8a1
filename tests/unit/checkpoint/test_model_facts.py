"""A resumed run is compared with the model that it was started from, by content and not by place."""

import json
import shutil
from dataclasses import replace

import pytest

from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, write_info
from megatron_v2pe.checkpoint.model_facts import model_facts, require_same_model
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.core.errors import ConfigError


def make(folder, *, step=0, run_state=None, content="a"):
    """A checkpoint of one file."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    values = {} if run_state is None else run_state.to_json()
    write_info(
        folder, CheckpointInfo(kind="import", step=step, family="f", num_parameters=1, run_state=values)
    )
    return folder


@pytest.fixture
def config(tmp_path):
    return load_run_config(None, [f"model.checkpoint={make(tmp_path / 'base')}"])


@pytest.fixture
def saved(config, tmp_path):
    """A checkpoint of a run of `config`."""
    state = RunState(step=3, consumed_packs=6, data_seed=0, data_hash="")
    return make(tmp_path / "saved", step=3, run_state=replace(state, model_facts=model_facts(config)))


def with_model(config, **fields):
    return replace(config, model=replace(config.model, **fields))


def test_a_model_that_was_moved_is_the_same(config, saved, tmp_path):
    require_same_model(config, saved)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    require_same_model(with_model(config, checkpoint=str(tmp_path / "moved")), saved)


def test_another_model_at_the_same_place_is_found(config, saved, tmp_path):
    shutil.rmtree(tmp_path / "base")
    make(tmp_path / "base", content="b")
    with pytest.raises(ConfigError, match=r"content of the model: \w+ -> \w+"):
        require_same_model(config, saved)


def test_what_is_frozen_counts_and_can_be_allowed(config, saved, caplog):
    changed = with_model(config, freeze_language=True)
    with pytest.raises(ConfigError, match=r"add checkpoint\.allow_changed_model=true") as error:
        require_same_model(changed, saved)
    assert "model.freeze_language: False -> True" in str(error.value)
    assert "content of the model" not in str(error.value)
    require_same_model(
        replace(changed, checkpoint=replace(changed.checkpoint, allow_changed_model=True)), saved
    )
    assert "although its model changed" in caplog.text


def test_a_hugging_face_folder_counts_by_configuration_names_and_sizes(config, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    (folder / "model.safetensors").write_bytes(b"12")
    config = with_model(config, checkpoint="", hf_path=str(folder))
    facts = model_facts(config)
    assert model_facts(config) == facts
    (folder / "model.safetensors").write_bytes(b"123")
    assert model_facts(config) != facts


def test_a_checkpoint_without_facts_is_accepted(config, tmp_path):
    state = RunState(step=3, consumed_packs=6, data_seed=0, data_hash="")
    require_same_model(config, make(tmp_path / "older", step=3, run_state=state))
