"""Paths of a run's file, addresses where paths are meant, and names of other programs."""

import pytest

from megatron_v2pe.config.key_names import SYNONYMS
from megatron_v2pe.config.load import dump_run_config, known_keys, load_run_config
from megatron_v2pe.core.errors import ConfigError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's file in another folder than the current one, with a meta json and a checkpoint beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "configs"
    (folder / "ckpt").mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (folder / "run.yaml").write_text(
        "data: {meta: meta.json}\nmodel: {checkpoint: ckpt}\nruntime: {run_dir: runs/a}\n"
    )
    return folder


def test_paths_beside_the_file_come_first_and_what_is_written_stays_here(folder):
    config = load_run_config(folder / "run.yaml")
    assert config.data.meta == str(folder / "meta.json")
    assert config.model.checkpoint == str(folder / "ckpt")
    assert config.runtime.run_dir == "runs/a"


def test_a_path_of_the_current_folder_is_found_too(folder):
    (folder / "meta.json").rename(folder.parent / "here" / "meta.json")
    assert load_run_config(folder / "run.yaml").data.meta == "meta.json"


def test_a_relative_name_of_the_file_gives_absolute_paths(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    config = load_run_config("configs/run.yaml")
    assert config.data.meta == str(folder / "meta.json")
    (folder.parent / "config.yaml").write_text(dump_run_config(config))
    assert load_run_config(folder.parent / "config.yaml") == config


def test_paths_on_the_command_line_are_of_the_current_folder(folder):
    assert load_run_config(folder / "run.yaml", ["data.meta=meta.json"]).data.meta == "meta.json"


@pytest.mark.parametrize("text", ["model.checkpoint=", "model.checkpoint=''", 'model.checkpoint=""'])
def test_an_override_may_be_empty(folder, text):
    assert load_run_config(folder / "run.yaml", [text]).model.checkpoint == ""


@pytest.mark.parametrize(
    "key", ["runtime.run_dir", "data.cache_dir", "data.meta", "model.checkpoint", "model.hf_path"]
)
def test_an_address_is_refused_and_not_repeated(key):
    with pytest.raises(ConfigError, match=rf"{key} is an address \(s3://\.\.\.\), but must be a") as caught:
        load_run_config(None, [f"{key}=s3://KEY:SECRET@bucket/x"])
    assert "SECRET" not in str(caught.value)


def test_names_of_other_programs_lead_to_ours():
    assert set(SYNONYMS.values()) <= set(known_keys())
    assert not {name for name in SYNONYMS if name in {key.partition(".")[2] for key in known_keys()}}


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("optim.max-steps", "optim.steps"),
        ("data.batch_size", "optim.global_batch_size"),
        ("runtime.output_dir", "runtime.run_dir"),
        ("parallel.tensor_parallel_size", "parallel.tp"),
        ("checkpoint.save_steps", "checkpoint.save_every"),
        ("vision.freeze_backbone", "vision.freeze"),
    ],
)
def test_the_nearest_key_is_the_right_one(key, ours):
    with pytest.raises(ConfigError, match=rf"unknown key {key}; did you mean {ours}\?"):
        load_run_config(None, [f"{key}=1"])


def test_home_is_meant_by_a_tilde_in_the_file_and_on_the_command_line(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (folder / "run.yaml").write_text("model: {checkpoint: ~/ckpt}\nruntime: {run_dir: ~/runs/a}\n")
    config = load_run_config(folder / "run.yaml", ["data.cache_dir=~/cache", "data.meta=a/~/b"])
    assert config.model.checkpoint == "/home/me/ckpt"
    assert config.runtime.run_dir == "/home/me/runs/a"
    assert config.data.cache_dir == "/home/me/cache"
    assert config.data.meta == "a/~/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 3000, "not valid YAML"),
        ("model: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("model: !!set {a, b}", "'set' is not a supported"),
        ("model: {checkpoint: '${oc.env'}", "model.checkpoint: no viable alternative"),
        ("model: {checkpoint: '${model.checkpoint}'}", "Recursive interpolation"),
        ("model: {checkpoint: '${nope:1}'}", "Unsupported interpolation type nope"),
        ("null: 2", "Incompatible key type"),
        ("1: 2", "unknown key 1"),
        ("5", "cannot be read (Invalid loaded object type: int)"),
        ("optim: {steps: 1" + "0" * 5000 + "}", "Exceeds the limit"),
        (r'model: {checkpoint: "a\0b"}', "model.checkpoint is 'a\\x00b', which has a null character"),
        (r'data: {curriculum: [{"a\0": "\0"}]}', "which has a null character"),
    ],
)
def test_a_file_that_no_run_can_mean_is_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path / "run.yaml")
    assert str(tmp_path / "run.yaml") in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=x", "'=x' is not an override"),
        ("model..checkpoint=x", "is not an override"),
        ("model.checkpoint=\udcff", "is not valid YAML"),  # a byte of the command line that is no UTF-8
        ("model.checkpoint=a\x00b", "is not valid YAML"),
        ("model.checkpoint=" + "[" * 3000, "(3,017 characters) is not valid YAML"),
        ("model.checkpoint=!!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
)
def test_an_override_that_no_run_can_mean_is_named(text, message):
    with pytest.raises(ConfigError, match="command line: ") as caught:
        load_run_config(None, [text])
    assert message in str(caught.value)
