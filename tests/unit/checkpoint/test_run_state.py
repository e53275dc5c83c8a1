"""A run state reports what changed in the data since it was written, and reads only states of its own form."""

from dataclasses import replace

import pytest

from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.core.errors import CheckpointError, ConfigError

FACTS = {"data.balance": True, "data set a: content": "1234", "data set a: repeat_time": 1.0}
STATE = RunState(step=3, consumed_packs=12, data_seed=1, data_hash="old", data_facts=FACTS)


def test_the_same_data_is_accepted():
    STATE.require_same_data(replace(STATE, consumed_packs=99))


def test_what_changed_is_named():
    facts = {**FACTS, "data set a: content": "5678", "data set b: content": "9"}
    with pytest.raises(ConfigError, match="stopped after 12 packs of another plan") as caught:
        STATE.require_same_data(replace(STATE, data_hash="new", data_facts=facts))
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["  data set a: content: 1234 -> 5678", "  data set b: content: absent -> 9"]


def test_long_lists_of_changes_are_cut():
    facts = {str(number): number for number in range(40)}
    with pytest.raises(ConfigError, match=r"\.\.\. and 31 more"):
        STATE.require_same_data(replace(STATE, data_hash="new", data_facts=facts))


def test_states_are_read_back_and_those_of_another_form_refused():
    values = STATE.to_json()
    assert RunState.from_json(values) == STATE
    with pytest.raises(CheckpointError, match="differ in: surprise"):
        RunState.from_json({**values, "surprise": 1})
    del values["data_facts"]
    with pytest.raises(CheckpointError, match="differ in: data_facts"):
        RunState.from_json(values)


def test_states_without_facts_are_compared_by_hash():
    with pytest.raises(ConfigError, match="settings old; now"):
        replace(STATE, data_facts={}).require_same_data(replace(STATE, data_hash="new"))


def test_a_change_that_is_allowed_is_logged(caplog):
    now = replace(STATE, data_hash="new", data_facts={**FACTS, "data.balance": False})
    with pytest.raises(ConfigError, match=r"checkpoint\.allow_changed_data=true to continue with step 4"):
        STATE.require_same_data(now)
    STATE.require_same_data(now, is_change_allowed=True)
    assert "continuing with step 4 of the new plan; changed:\n  data.balance: True -> False" in caplog.text
