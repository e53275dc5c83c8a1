"""A document on disk: what is loaded answers as what was saved, and nothing else is taken for it."""

import json

import pytest

from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.session import load_session, save_session
from tests.support.prompts import random_prompt

MESSAGES = [Message(role="human", text="one <image>", images=("a.png",)), Message(role="gpt", text="two")]


@pytest.fixture
def saved(engine, checkpoint, tmp_path):
    engine.documents.max_tokens = 10_000
    prompt = random_prompt(engine.arch, [10, ("image", 3), 20])
    answer = engine.begin(prompt)
    engine.advance([answer])
    engine.finish(answer)
    save_session(engine, tmp_path / "session", checkpoint=checkpoint, messages=MESSAGES)
    return tmp_path / "session", prompt.with_tokens([*answer.tokens, 7])


@pytest.mark.parametrize("kind", ["model", "int8", "fp8"])
def test_a_loaded_session_answers_like_the_one_that_was_saved(engine, checkpoint, tmp_path, kind):
    engine.documents.max_tokens, engine.kv = 10_000, kind
    prompt = random_prompt(engine.arch, [10, ("image", 3), 20])
    answer = engine.begin(prompt)
    engine.finish(answer)
    folder = tmp_path / "session"
    save_session(engine, folder, checkpoint=checkpoint, messages=MESSAGES)
    further = prompt.with_tokens([*answer.tokens, 7])
    wanted = engine.begin(further, logits=True)
    engine.documents.clear()
    assert load_session(engine, folder, checkpoint=checkpoint) == MESSAGES
    found = engine.begin(further, logits=True)
    assert found.reused_tokens == wanted.reused_tokens == prompt.layout.num_tokens
    assert bool((found.steps[0].logits == wanted.steps[0].logits).all())
    assert sorted(path.name for path in folder.iterdir()) == [
        "kv_tp0_pp0_cp0.safetensors",
        "kv_tp0_pp0_cp0.sha256",
        "session.json",
    ]


def test_an_existing_folder_is_not_replaced(engine, checkpoint, saved):
    with pytest.raises(ConfigError, match="exists"):
        save_session(engine, saved[0], checkpoint=checkpoint, messages=[])


def test_nothing_to_save(engine, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="ask something first"):
        save_session(engine, tmp_path / "session", checkpoint=checkpoint, messages=[])


def test_another_checkpoint_or_storage_is_refused(engine, checkpoint, saved, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was saved with checkpoint"):
        load_session(engine, saved[0], checkpoint=other)
    engine.kv = "int8"
    with pytest.raises(CheckpointError, match="was saved with kv 'model', but here it is 'int8'"):
        load_session(engine, saved[0], checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["session.json", "kv_tp0_pp0_cp0.safetensors"])
def test_damage_is_found(engine, checkpoint, saved, name):
    path = saved[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if name.endswith("json"):
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged"):
        load_session(engine, saved[0], checkpoint=checkpoint)


def test_no_session_at_all(engine, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file"):
        load_session(engine, tmp_path, checkpoint=checkpoint)


def test_tokens_are_in_the_file(saved):
    facts = json.loads((saved[0] / "session.json").read_text())
    assert len(facts["content"]["tokens"]) == facts["spans"][-1][1] == facts["content"]["num_tokens"] - 1
