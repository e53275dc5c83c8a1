"""How a run trained is written into config.json, and is what a later answer uses; contradictions are said."""

import json

import pytest

from megatron_v2pe.checkpoint.hf.config_json import update_trained
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.config.trained_settings import answer_data, trained_values
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from tests.support.hf_folders import edit_config, golden_copy

CHANGED = {
    "template": "internvl2_5",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "pad2square": True,
    "min_dynamic_patch": 2,
    "max_dynamic_patch": 5,
    "normalize_type": "siglip",
}


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path / "hf")


def write(folder, **data):
    config = RunConfig(data=DataConfig(max_sample_tokens=3000, **data))
    update_trained(folder / "config.json", trained_values(config, read_architecture(folder)))
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("key", list(CHANGED))
def test_each_setting_travels(folder, key):
    extra = {"max_dynamic_patch": 5} if key == "min_dynamic_patch" else {}
    values = write(folder, **{key: CHANGED[key], **extra})
    assert values[key] == CHANGED[key]
    if key == "template":
        assert read_architecture(folder).template == CHANGED[key]
    else:
        assert getattr(answer_data(folder), key) == CHANGED[key]


def test_the_trained_length_is_that_of_the_run(folder):
    before = read_architecture(folder)
    assert before.trained_length == before.language.max_position_embeddings
    write(folder)
    assert read_architecture(folder).trained_length == 3000


def test_a_file_of_which_all_is_true_keeps_its_bytes(folder):
    write(folder)
    before = (folder / "config.json").read_bytes()
    write(folder)
    assert (folder / "config.json").read_bytes() == before


def test_an_option_wins_and_a_contradiction_is_said(folder, caplog):
    write(folder, max_dynamic_patch=5)
    assert answer_data(folder).max_dynamic_patch == 5
    assert not caplog.text
    assert answer_data(folder, max_dynamic_patch=2).max_dynamic_patch == 2
    assert "--max-dynamic-patch is 2, but the config.json of this checkpoint says 5" in caplog.text
    with pytest.raises(ConfigError, match=r"--max-dynamic-patch is 0"):
        answer_data(folder, max_dynamic_patch=0)


def test_values_that_cannot_be_are_blamed_on_config_json(folder):
    edit_config(folder, max_dynamic_patch=2, min_dynamic_patch=3)
    with pytest.raises(CheckpointError, match=r"config\.json: min_dynamic_patch is 3, more than"):
        answer_data(folder)
    edit_config(folder, min_dynamic_patch=1, normalize_type="other")
    with pytest.raises(
        CheckpointError, match="normalize_type is 'other', but must be one of imagenet, clip, siglip"
    ):
        answer_data(folder)
