"""import-hf, export-hf: the same files come back, byte for byte; verify sees every difference."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.hf.config_json import update_positions
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import (
    GOLDEN,
    edit_config,
    edit_weights,
    folder_bytes,
    golden_copy,
    random_folder,
)

SMALL_LLM = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 77,
}
SMALL_VISION = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": 3}
LIKE_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}


def test_golden_checkpoint_comes_back_byte_for_byte(tmp_path):
    info = import_hf(GOLDEN, tmp_path / "ckpt")
    assert (info.kind, info.family, info.num_parameters) == ("import", "internlm2_vit300m", 272_832)
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(GOLDEN)


@pytest.mark.parametrize(
    ("dtype", "vision"), [(torch.bfloat16, {}), (torch.float16, {}), (torch.bfloat16, LIKE_6B)]
)
def test_sharded_folder_comes_back_byte_for_byte(tmp_path, dtype, vision):
    source = random_folder(
        tmp_path / "hf", shards=3, dtype=dtype, llm=SMALL_LLM, vision=SMALL_VISION | vision
    )
    (source / "examples").mkdir()
    (source / "examples" / "image.txt").write_text("a side file in a folder")
    (source / "modeling_internvl_chat.py").write_text("raise SystemExit('never run')\n")
    import_hf(source, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(source)
    assert verify(source, tmp_path / "ckpt").is_equal


def test_export_into_other_shards_keeps_every_tensor(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=300_000)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    source = load_file(GOLDEN / "model.safetensors")
    assert set(index["weight_map"]) == set(found) == set(source)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in source.values())
    assert all(torch.equal(found[name], source[name]) for name in source)
    import_hf(tmp_path / "back", tmp_path / "again")
    assert verify(GOLDEN, tmp_path / "again").different == {}


def test_state_keys_are_parameter_names_and_values_follow_mcores_layout(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    reader = StateReader(state_path(tmp_path / "ckpt"))
    source = load_file(GOLDEN / "model.safetensors")
    layer = "language_model.model.layers.1.feed_forward."
    fc1 = reader.read("language.decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(fc1, torch.cat([source[layer + "w1.weight"], source[layer + "w3.weight"]]))
    wqkv = source["language_model.model.layers.0.attention.wqkv.weight"]
    assert torch.equal(reader.read("language.decoder.layers.0.self_attention.linear_qkv.weight"), wqkv)
    bias = source["vision_model.encoder.layers.0.attn.qkv.bias"].view(3, 4, 16)  # 4 heads of 16 channels
    ours = reader.read("vision.encoder.layers.0.self_attention.linear_qkv.bias").view(4, 3, 16)
    assert torch.equal(ours, bias.transpose(0, 1))
    assert reader.tensors["language.embedding.word_embeddings.weight"].shape == (600, 64)


def test_verify_names_what_differs(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    changed = golden_copy(tmp_path / "changed")
    w1 = load_file(GOLDEN / "model.safetensors")["language_model.model.layers.0.feed_forward.w1.weight"]
    w1[3, 5] += 1
    edit_weights(changed, language_model__model__layers__0__feed_forward__w1__weight=w1)
    (changed / "generation_config.json").write_text("{}")
    (changed / "added_tokens.json").unlink()
    report = verify(changed, tmp_path / "ckpt")
    assert list(report.different) == ["language_model.model.layers.0.feed_forward.w1.weight"]
    assert report.num_equal == 54
    assert report.source_sha256 != report.checkpoint_sha256
    assert report.side_files == {
        "added_tokens.json": "only in the checkpoint",
        "generation_config.json": "differs",
    }
    assert report.lines()[-1] == "NOT equal"


def test_recomputed_buffers_are_dropped_with_a_reason(tmp_path):
    source = golden_copy(tmp_path / "hf")
    name = "language_model.model.layers.0.attention.rotary_emb.inv_freq"
    edit_weights(source, **{name.replace(".", "__"): torch.ones(8)})
    import_hf(source, tmp_path / "ckpt")
    report = verify(source, tmp_path / "ckpt")
    assert report.dropped == {name: "follows from rope_theta and rope_scaling of config.json"}
    assert report.is_equal
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert name not in load_file(tmp_path / "back" / "model.safetensors")


@pytest.mark.parametrize(
    ("mode", "stride", "expected"),
    [
        ("v2pe_fixed", 16, {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": 16}),
        ("v2pe_random", 0, {"rope_pos_id_version": "v2pe_rnd"}),
    ],
)
def test_trained_positions_are_written_with_the_releases_names(tmp_path, mode, stride, expected):
    config = golden_copy(tmp_path / "hf") / "config.json"
    before = json.loads(config.read_text())
    update_positions(config, mode=mode, stride=stride)
    assert json.loads(config.read_text()) == {**before, **expected}
    once = config.read_bytes()
    update_positions(config, mode=mode, stride=stride)
    assert config.read_bytes() == once


def test_default_positions_leave_a_silent_config_alone_and_correct_a_wrong_one(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    update_positions(folder / "config.json", mode="default", stride=0)
    assert (folder / "config.json").read_bytes() == (GOLDEN / "config.json").read_bytes()
    edit_config(folder, rope_pos_id_version="v2pe_rnd")
    update_positions(folder / "config.json", mode="default", stride=0)
    assert json.loads((folder / "config.json").read_text())["rope_pos_id_version"] == "default"


def test_import_reads_through_links_as_a_hub_cache_has_them(tmp_path):
    linked, blobs = tmp_path / "hub" / "snapshots" / "4f3c", tmp_path / "hub" / "blobs"
    linked.mkdir(parents=True)
    shutil.copytree(GOLDEN, blobs)
    for path in blobs.iterdir():
        os.symlink(f"../../blobs/{path.name}", linked / path.name)
    import_hf(linked, tmp_path / "ckpt")
    assert not any(path.is_symlink() for path in (tmp_path / "ckpt").rglob("*"))
    assert verify(GOLDEN, tmp_path / "ckpt").is_equal


def test_info_lists_every_file(tmp_path):
    import_hf(GOLDEN, tmp_path / "ckpt")
    listed = set(read_info(tmp_path / "ckpt").files)
    assert listed == set(folder_bytes(tmp_path / "ckpt")) - {"checkpoint.json"}
