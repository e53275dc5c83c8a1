"""Tokenizer, embedding, template and config.json are compared; what does not fit is named, with the way out."""

import json
import shutil

import pytest

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, RunConfig
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.data.samples.settings import sample_settings
from tests.support.hf_folders import GOLDEN, edit_config, golden_copy


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path / "hf")


def add_token(folder, index):
    """As somebody does who adds a token and does not resize the embedding."""
    path = folder / "added_tokens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "<|mytask|>": index}))


def settings(folder, **data):
    return sample_settings(RunConfig(data=DataConfig(**data)), read_architecture(folder), folder)


@pytest.mark.parametrize("index", [600, 639, 700])  # 600 to 639 are rows that a run pads with
def test_an_id_without_a_row_is_refused_at_import_and_by_a_run(folder, tmp_path, index):
    add_token(folder, index)
    message = (
        rf"ids up to {index}, but vocab_size of config\.json .* 600 rows \(ids 0\.\.599\): "
        rf"'<\|mytask\|>' = {index}"
    )
    with pytest.raises(CheckpointError, match=message):
        import_hf(folder, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=message):
        settings(folder)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("key", ["a_internlm2_vit300m", "c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m"])
def test_golden_folders_fit(key):
    folder = GOLDEN.parent / key
    assert settings(folder).text.template.name == read_architecture(folder).template


@pytest.mark.parametrize(
    ("key", "template", "fitting"),
    [("a_internlm2_vit300m", "phi3-chat", "internlm2-chat"), ("e_phi3_vit300m", "internvl2_5", "phi3-chat")],
)
def test_a_template_of_another_family_is_refused_and_those_that_fit_are_named(key, template, fitting):
    with pytest.raises(
        ConfigError, match=rf"data\.template is '{template}', but .* templates that fit it: .*{fitting}"
    ):
        settings(GOLDEN.parent / key, template=template)


@pytest.mark.parametrize(
    ("value", "state"),
    [(None, "is missing or empty"), ("", "is missing or empty"), ("v3", "is 'v3', which is unknown")],
)
def test_a_template_that_config_json_lacks_is_blamed_on_config_json(folder, tmp_path, caplog, value, state):
    edit_config(folder, template=value)
    import_hf(folder, tmp_path / "ckpt")
    assert f"config.json: key 'template' {state}" in caplog.text  # a run may still name one
    with pytest.raises(CheckpointError, match=rf"config\.json: key 'template' {state}; the templates are"):
        settings(folder)
    assert settings(folder, template="internlm2-chat").text.template.name == "internlm2-chat"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_the_tokenizer_is_read_at_import(folder, tmp_path, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        import_hf(folder, tmp_path / "ckpt")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4411571040\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer_config.json", "model.safetensors", "config.json"]
)
def test_a_git_lfs_pointer_is_named(folder, tmp_path, name):
    (folder / name).write_text(LFS)
    with pytest.raises(CheckpointError, match=rf"{name}: is a git-lfs pointer.*git lfs pull"):
        import_hf(folder, tmp_path / "ckpt")


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "nothing", "../other"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, target):
    (tmp_path / "other").write_text("x")
    (folder / "notes.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link to"):
        import_hf(folder, tmp_path / "ckpt")


def test_a_peft_folder_names_base(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    shutil.copyfile(GOLDEN / "model.safetensors", tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"PEFT folder .*--base"):
        import_hf(tmp_path / "peft", tmp_path / "ckpt")
