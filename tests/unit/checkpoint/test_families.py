"""Every language family: names, shapes and bits in and out, tied embeddings, and where its heads land."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.families import FAMILIES
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import (
    GOLDEN,
    edit_config,
    edit_weights,
    folder_bytes,
    golden_copy,
    random_folder,
)

CKPT = GOLDEN.parent
GOLDENS = ["c_qwen2_vit300m", "d_llama_vit6b", "e_phi3_vit300m"]
HEAD = "language_model.lm_head.weight"
SIZES = {
    "hidden_size": 60,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 28,
    "vocab_size": 77,
    "rope_scaling": None,
}


@pytest.mark.parametrize("key", GOLDENS)
def test_golden_checkpoints_come_back_byte_for_byte(tmp_path, key):
    info = import_hf(CKPT / key, tmp_path / "ckpt")
    assert info.family == key[2:]
    assert info.num_parameters == sum(t.numel() for t in load_file(CKPT / key / "model.safetensors").values())
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(CKPT / key)
    assert verify(CKPT / key, tmp_path / "ckpt").is_equal


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_other_sizes_come_back_byte_for_byte(tmp_path, architecture, kv_heads):
    llm = {**SIZES, "architectures": [architecture], "num_key_value_heads": kv_heads}
    if FAMILIES[architecture].reads_head_dim:
        llm["head_dim"] = 14
    if FAMILIES[architecture].experts:
        llm |= {"num_experts": 3, "num_experts_per_tok": 2}
    if architecture == "Qwen3MoeForCausalLM":
        llm |= {"moe_intermediate_size": 12, "mlp_only_layers": [0]}
    if architecture == "GptOssForCausalLM":
        llm |= {"attention_bias": True, "rope_scaling": {"rope_type": "default"}}
    source = random_folder(tmp_path / "hf", shards=2, dtype=torch.bfloat16, llm=llm, vision={})
    import_hf(source, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(source)


def test_separate_heads_lie_in_groups(tmp_path):
    """Qwen2: 4 query heads, 2 kv heads of 16 channels; weight and bias alike."""
    import_hf(CKPT / "c_qwen2_vit300m", tmp_path / "ckpt")
    reader = StateReader(state_path(tmp_path / "ckpt"))
    source = load_file(CKPT / "c_qwen2_vit300m" / "model.safetensors")
    for kind in ("weight", "bias"):
        prefix = "language_model.model.layers.1.self_attn."
        q, k, v = (source[f"{prefix}{name}_proj.{kind}"].unflatten(0, (-1, 16)) for name in "qkv")
        ours = reader.read(f"language.decoder.layers.1.self_attention.linear_qkv.{kind}")
        wanted = torch.cat([q[0:2], k[0:1], v[0:1], q[2:4], k[1:2], v[1:2]]).flatten(0, 1)
        assert torch.equal(ours, wanted)


def test_wrong_shape_of_one_of_three(tmp_path):
    folder = tmp_path / "hf"
    random_folder(
        folder, shards=1, dtype=torch.float32, llm=SIZES | {"architectures": ["Qwen2ForCausalLM"]}, vision={}
    )
    edit_config(folder, llm_config={"num_key_value_heads": 2})
    with pytest.raises(
        CheckpointError, match=r"k_proj.weight: has shape \(30, 60\), config.json makes it \(20, 60\)"
    ):
        import_hf(folder, tmp_path / "ckpt")


def test_the_head_of_tied_embeddings_is_no_parameter():
    for key in (GOLDEN.name, *GOLDENS):
        values = json.loads((CKPT / key / "config.json").read_text())
        untied = name_map(parse_architecture(values))
        values["llm_config"]["tie_word_embeddings"] = True
        tied = name_map(parse_architecture(values))
        assert set(untied.by_ours) - set(tied.by_ours) == {"language.output_layer.weight"}
        (head,) = set(untied.by_hf) - set(tied.by_hf)
        assert tied.drop_reason(head) == "is the embedding (tie_word_embeddings)"


def test_tied_embeddings_come_back_with_and_without_a_copy(tmp_path):
    source = golden_copy(tmp_path / "hf", key="c_qwen2_vit300m")
    edit_config(source, llm_config={"tie_word_embeddings": True})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: differs from .*embed_tokens.*it would be lost"
    ):
        import_hf(source, tmp_path / "with_copy")
    embedding = load_file(source / "model.safetensors")["language_model.model.embed_tokens.weight"]
    edit_weights(source, **{HEAD.replace(".", "__"): embedding.clone()})
    import_hf(source, tmp_path / "with_copy")
    export_hf(tmp_path / "with_copy", tmp_path / "back")
    assert set(verify(source, tmp_path / "with_copy").dropped) == {HEAD}
    assert HEAD not in load_file(tmp_path / "back" / "model.safetensors")
    edit_weights(source, **{HEAD.replace(".", "__"): None})
    import_hf(source, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(source)
