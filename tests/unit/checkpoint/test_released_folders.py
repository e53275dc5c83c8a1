"""Folders as the V2PE release and InternVL2.5 write them: their config.json, random weights, small sizes."""

import pytest
import torch

from megatron_v2pe.assembly.mcore_config import rope_spec
from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.hf.name_map import family_name, name_map
from megatron_v2pe.config.arch.architecture import parse_architecture, read_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import PositionConfig, RunConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.text.templates import get_template
from megatron_v2pe.v2pe.rope import inverse_frequencies
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import edit_config, folder_bytes, random_folder

SMALL_LLM = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 151,
}
SMALL_VISION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "image_size": 56,
}
PLAIN = {"factor": 1.0, "type": "v2pe"}  # what the release writes (its own code cannot read it again)
DYNAMIC = {"factor": 2.0, "type": "dynamic"}
RING = {"attn_type": "ring", "chunk_num": 8, "rope_pos_id_stride": None, "group_list": None}


def folder(tmp_path, size, *, llm=None, top=None):
    """A small folder with every key of a published size's config.json."""
    values = PUBLISHED[size]
    sections = {
        "llm": {**values["llm_config"], **SMALL_LLM, **(llm or {})},
        "vision": {**values["vision_config"], **SMALL_VISION},
    }
    rest = {key: value for key, value in values.items() if not isinstance(value, dict)}
    top = {**rest, "force_image_size": 56, **(top or {})}
    return random_folder(tmp_path / "hf", shards=1, dtype=torch.bfloat16, top=top, **sections)


def there_and_back(source, tmp_path):
    """Import and export give the same bytes; returns the architecture."""
    import_hf(source, tmp_path / "ckpt")
    assert verify(source, tmp_path / "ckpt").is_equal
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    written, wanted = folder_bytes(tmp_path / "back"), folder_bytes(source)
    assert written["config.json"] == wanted["config.json"]
    assert {name for name in written if name.endswith(".safetensors")} == {
        name for name in wanted if name.endswith(".safetensors")
    }
    assert all(written[name] == data for name, data in wanted.items() if name.endswith(".safetensors"))
    return read_architecture(source)


@pytest.mark.parametrize("scaling", [PLAIN, DYNAMIC, None], ids=["v2pe", "dynamic", "none"])
@pytest.mark.parametrize("version", ["v2pe_rnd", "v2pe_fix"])
def test_v2pe_checkpoints_rotate_by_plain_frequencies(tmp_path, version, scaling):
    llm = {"rope_scaling": scaling, "rope_pos_id_version": version}
    top = {**RING, "rope_pos_id_version": version}
    if version == "v2pe_fix":
        top["rope_pos_id_stride"] = 2
    arch = there_and_back(folder(tmp_path, "2B", llm=llm, top=top), tmp_path)
    assert arch.position_mode == {"v2pe_rnd": "v2pe_random", "v2pe_fix": "v2pe_fixed"}[version]
    assert arch.position_stride == (2 if version == "v2pe_fix" else 0)
    spec = rope_spec(RunConfig(), arch)
    assert spec.fractional
    wanted = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    beyond = 4 * arch.language.max_position_embeddings  # where dynamic NTK would stretch them
    torch.testing.assert_close(inverse_frequencies(spec, beyond), wanted)


def test_a_checkpoint_before_v2pe_keeps_its_scaling(tmp_path):
    arch = there_and_back(folder(tmp_path, "2B"), tmp_path)
    assert arch.position_mode == "default"
    spec = rope_spec(RunConfig(), arch)
    assert (spec.scaling.kind, spec.scaling.factor, spec.fractional) == ("dynamic", 2.0, False)
    trained = RunConfig(position=PositionConfig(mode="v2pe_random"))
    assert rope_spec(trained, arch).scaling.kind == "none"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_pos_id_version", "v3", "rope_pos_id_version is 'v3', known values are 'default', 'v2pe_fix'"),
        # Features of an inner layer of the tower.
        ("select_layer", -4, "select_layer is -4, known values are -1"),
    ],
)
def test_what_no_release_has_is_refused(tmp_path, key, value, words):
    source = folder(tmp_path, "2B")
    edit_config(source, **{key: value})
    with pytest.raises(CheckpointError, match=words):
        import_hf(source, tmp_path / "ckpt")


QWEN2_5 = {"vocab_size": 151674, "tie_word_embeddings": False, "rope_scaling": None, "sliding_window": None}
# InternVL2.5: (size it shares the rest with, language model's own keys, millions of parameters of its model card)
INTERNVL2_5 = {
    "1B": ("1B", QWEN2_5, 938),
    "2B": ("2B", {}, 2206),
    "4B": (
        "1B",
        {
            **QWEN2_5,
            "num_hidden_layers": 36,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11008,
        },
        3713,
    ),
    "8B": ("8B", {}, 8075),
    "26B": ("26B", {}, 25514),
    "38B": (
        "1B",
        {
            **QWEN2_5,
            "num_hidden_layers": 64,
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 27648,
        },
        38388,
    ),
    "78B": (
        "1B",
        {
            **QWEN2_5,
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 29568,
        },
        78408,
    ),
}


@pytest.mark.parametrize("size", INTERNVL2_5)
def test_internvl2_5_adds_up(size):
    like, llm, millions = INTERNVL2_5[size]
    values = {**PUBLISHED[like], "template": "internvl2_5"}
    values["llm_config"] = {**values["llm_config"], **llm}
    if size in ("38B", "78B"):
        values["vision_config"] = PUBLISHED["26B"]["vision_config"]
    arch = parse_architecture(values)
    assert round(name_map(arch).num_parameters / 1e6) == millions
    assert get_template(arch.template).separator == "<|im_end|>\n"


@pytest.mark.parametrize(("size", "family"), [("1B", "qwen2_vit300m"), ("26B", "internlm2_vit6b")])
def test_internvl2_5_folders_come_back(tmp_path, size, family):
    _, llm, _ = INTERNVL2_5[size]
    llm = {**llm, "vocab_size": 151}
    source = folder(tmp_path, size, llm=llm, top={"template": "internvl2_5", "transformers_version": None})
    assert family_name(there_and_back(source, tmp_path)) == family
