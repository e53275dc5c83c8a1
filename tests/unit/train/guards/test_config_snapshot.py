"""What the log says of settings that a resumed run changes."""

import logging

from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.train.guards.config_snapshot import FILE, changes, write_config_snapshot

RUN = ["model.checkpoint=ckpt", "data.curriculum=[{max_sample_tokens: 9}]"]


def config(*overrides):
    return load_run_config(None, [*RUN, *overrides])


def test_equal_settings_change_nothing():
    assert changes(config(), config()) == []


def test_every_changed_field_is_named_with_both_values():
    now = config("optim.lr=1e-3", "position.mode=v2pe_random", "data.curriculum=[{max_sample_tokens: 8}]")
    curriculum, mode, rate = changes(config(), now)
    assert curriculum.startswith("data.curriculum: (CurriculumStage(from_step=0, max_sample_tokens=9)")
    assert mode == "position.mode: 'default' -> 'v2pe_random'"
    assert rate == "optim.lr: 5e-06 -> 0.001"


def test_a_resumed_run_logs_changes_and_the_next_compares_with_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "megatron_v2pe")
    write_config_snapshot(tmp_path, config(), is_resumed=False)
    write_config_snapshot(tmp_path, config("optim.lr=1e-3"), is_resumed=True)
    write_config_snapshot(tmp_path, config("optim.lr=1e-3"), is_resumed=True)
    assert caplog.messages == ["changed since the last start: optim.lr: 5e-06 -> 0.001"]
    assert load_run_config(tmp_path / FILE) == config("optim.lr=1e-3")


def test_a_file_that_cannot_be_compared_is_reported_and_replaced(tmp_path, caplog):
    (tmp_path / FILE).write_text("optim: {gone: 1}\n")
    write_config_snapshot(tmp_path, config(), is_resumed=True)
    assert "unknown key optim.gone" in caplog.text
    assert load_run_config(tmp_path / FILE) == config()
