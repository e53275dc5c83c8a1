"""Folders of other programs are recognised by their names, and the way out is one sentence."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import FAMILIES_GOLDEN, golden_copy

LANGUAGE = "language_model."


def with_lora(weights):
    """As InternVL's own LoRA training saves them."""
    found = {}
    for name, tensor in weights.items():
        inner = (
            f"{LANGUAGE}base_model.model.{name.removeprefix(LANGUAGE)}" if name.startswith(LANGUAGE) else name
        )
        if "wqkv" in inner:
            found[inner.replace(".weight", ".base_layer.weight")] = tensor
            found[inner.replace(".weight", ".lora_A.default.weight")] = torch.zeros(4, tensor.shape[1])
        else:
            found[inner] = tensor
    return found


def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def quantised(weights):
    return {name.replace("wqkv.weight", "wqkv.qweight"): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_lora, r"LoRA adapters that were not merged .*tools/merge_lora\.py"),
        (prefixed("module."), r"have 'module\.' in front .*DDP or DeepSpeed.*take it out"),
        (prefixed("_orig_mod."), r"have '_orig_mod\.' in front .*torch\.compile"),
        (prefixed("student."), r"have 'student\.' in front"),
        (prefixed("model."), r"have 'model\.' in front .*name\.removeprefix\('model\.'\)"),
        (quantised, "parts of quantised weights"),
    ],
)
def test_names_of_another_program_are_one_sentence(tmp_path, change, message):
    folder = golden_copy(tmp_path / "hf")
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as error:
        import_hf(folder, tmp_path / "ckpt")
    assert str(error.value).count("\n") == 1


def test_a_single_file_beside_shards_is_refused(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="two sets of weights"):
        import_hf(folder, tmp_path / "ckpt")


def test_adapters_beside_whole_weights_are_refused(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="adapters beside whole weights, which would be left out"):
        import_hf(folder, tmp_path / "ckpt")


def test_weights_relabelled_as_integers_are_refused(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointError, match="has dtype int32, but weights are floating point numbers"):
        import_hf(folder, tmp_path / "ckpt")


KEY = "i_qwen3_vit6b"  # its native folder has the names of transformers 5


def with_weights(tmp_path, weights, config):
    folder = shutil.copytree(
        FAMILIES_GOLDEN / "ckpt" / KEY, tmp_path / "mixed", copy_function=shutil.copyfile
    )
    shutil.copyfile(FAMILIES_GOLDEN / config / KEY / "config.json", folder / "config.json")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def published(weights):
    """The language model in the spelling of published folders, the rest as transformers 5 writes it."""
    return {name.replace("model.language_model.", "language_model.model."): t for name, t in weights.items()}


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("ckpt", lambda _, native: native, r"65 of 65 tensors have names of native folders .*GitHub folders"),
        ("ckpt_hf", lambda github, _: github, r"36 of 61 tensors .* GitHub folders .* of native folders"),
        ("ckpt", lambda github, native: github | native, r"have names of native folders .* and 61 have the names"),
        ("ckpt_hf", lambda _, native: published(native), r"names of native folders .* transformers 5 wrote"),
    ],
    ids=["native names", "GitHub names", "both", "both native spellings"],
)  # fmt: skip
def test_two_formats_in_one_folder(tmp_path, config, change, message):
    weights = (load_file(FAMILIES_GOLDEN / part / KEY / "model.safetensors") for part in ("ckpt", "ckpt_hf"))
    folder = with_weights(tmp_path, change(*weights), config)
    with pytest.raises(CheckpointError, match=message) as error:
        import_hf(folder, tmp_path / "ckpt")
    assert str(error.value).count("\n") == 1
    assert not (tmp_path / "ckpt").exists()
