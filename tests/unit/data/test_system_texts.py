"""The system text that a run trains is in its checkpoint, and is what answers are given with."""

import json

import pytest

from megatron_v2pe.checkpoint.hf.config_json import update_trained
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.config.trained_settings import trained_values
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.samples.settings import sample_settings, with_system
from megatron_v2pe.data.text.templates import TEMPLATES, Turn, get_template, render
from tests.support.hf_folders import edit_config, golden_copy
from tests.support.mixture import record

FRENCH = "Answer in French."
TURN = {"from": "system", "value": FRENCH}


def with_turn(values):
    return {**values, "conversations": [TURN, *values["conversations"]]}


def system_of(mixture, caplog=None, **data):
    return mixture.loader(mixture.config(**data)).system_text


def test_of_the_data_set(mixture):
    mixture.write([record("a", "b"), record("c", "d")], system=FRENCH)
    assert system_of(mixture) == FRENCH


def test_of_every_record(mixture):
    mixture.write([with_turn(record("a", "b")), {**record("c", "d"), "system": FRENCH}])
    assert system_of(mixture) == FRENCH


def test_of_the_template(mixture):
    mixture.write([record("a", "b")])
    assert system_of(mixture) == ""
    text = get_template("internlm2-chat").system_text
    mixture.write([record("a", "b")], system=text)
    assert system_of(mixture) == ""


@pytest.mark.parametrize("other", [{}, {"system": "Be brief."}])
def test_different_ones_are_said_and_none_is_kept(mixture, caplog, other):
    caplog.set_level("WARNING", logger="megatron_v2pe")
    mixture.write([with_turn(record("a", "b")), record("c", "d")], **other)
    assert system_of(mixture) is None
    assert "2 different system texts" in caplog.text
    assert FRENCH in caplog.text


def test_a_very_long_one_is_not_kept(mixture, caplog):
    caplog.set_level("WARNING", logger="megatron_v2pe")
    mixture.write([{**record("a", "b"), "system": "word " * 2000}])
    assert system_of(mixture, max_pack_tokens=8192, max_sample_tokens=8192) is None
    assert "too long" in caplog.text


def write(folder, system):
    config = RunConfig(data=DataConfig())
    update_trained(folder / "config.json", trained_values(config, read_architecture(folder), system=system))
    return json.loads((folder / "config.json").read_text())


def test_it_travels_and_is_used(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    assert "system_message" not in write(folder, "")
    assert "system_message" not in write(folder, None)
    assert write(folder, FRENCH)["system_message"] == FRENCH
    settings = sample_settings(RunConfig(), read_architecture(folder), folder)
    turns = [Turn(role="human", value="Hello")]
    own = render(settings.text.template, turns)
    asked = render(get_template("internlm2-chat"), [Turn(role="system", value=FRENCH), *turns])
    assert (own.text, own.written) == (asked.text, asked.written)
    assert write(folder, "")["system_message"] == ""


@pytest.mark.parametrize("value", [None, "", FRENCH])
def test_null_means_the_templates(tmp_path, value):
    folder = golden_copy(tmp_path / "hf")
    edit_config(folder, system_message=value)
    settings = sample_settings(RunConfig(), read_architecture(folder), folder)
    wanted = value or TEMPLATES["internlm2-chat"].system_text
    assert settings.text.template.system_text == wanted


def test_another_one_named_by_the_user_is_said(tmp_path, caplog):
    caplog.set_level("WARNING", logger="megatron_v2pe")
    folder = golden_copy(tmp_path / "hf")
    edit_config(folder, system_message=FRENCH)
    settings = sample_settings(RunConfig(), read_architecture(folder), folder)
    assert with_system(settings, None) is settings
    assert with_system(settings, FRENCH).text.template.system_text == FRENCH
    assert not caplog.text
    assert with_system(settings, "Be brief.").text.template.system_text == "Be brief."
    assert FRENCH in caplog.text
    with pytest.raises(ConfigError, match="system text has no images"):
        with_system(settings, "See <image>")
