"""Folders of other programs are recognised by their names, and the way out is one sentence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import golden_copy

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
