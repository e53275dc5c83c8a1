"""Every value of a config.json has a type and bounds; each odd one is an error that names it."""

import ast
import json
import math
from pathlib import Path

import pytest

import megatron_v2pe.config
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.arch.json_values import VALUES
from megatron_v2pe.core.errors import CheckpointError
from tests.support.hf_folders import edit_config, golden_copy

CONFIG = Path(megatron_v2pe.config.__file__).parent
FREE = {
    "github_architecture",
    "github_model_type",
    # piip_config, which `config/arch/pyramid.py` checks itself
    *(
        "piip_config",
        "branches",
        "readout",
        "readout_norm",
        "interact_attn_type",
        "interaction_proj",
        "norm_layer",
    ),
}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("llm_config", "num_hidden_layers", 10**12),
        ("llm_config", "num_hidden_layers", "2"),
        ("llm_config", "hidden_size", 0),
        ("llm_config", "hidden_size", 63),
        ("llm_config", "num_key_value_heads", 3),
        ("llm_config", "rms_norm_eps", math.nan),
        ("llm_config", "rms_norm_eps", -1e-5),
        ("llm_config", "rope_theta", 0),
        ("llm_config", "vocab_size", -1),
        ("llm_config", "vocab_size", 92553.5),
        ("llm_config", "tie_word_embeddings", "abc"),
        ("llm_config", "architectures", []),
        ("llm_config", "architectures", "InternLM2ForCausalLM"),
        ("llm_config", "rope_scaling", {"type": "dynamic", "factor": math.inf}),
        ("vision_config", "num_attention_heads", 0),
        ("vision_config", "patch_size", 0),
        ("vision_config", "layer_norm_eps", math.inf),
        ("vision_config", "qkv_bias", [True]),
        (None, "force_image_size", -1),
        (None, "force_image_size", 13),
        (None, "downsample_ratio", 0),
        (None, "downsample_ratio", 0.3),
        (None, "template", 7),
        (None, "vision_config", []),
        (None, "rope_pos_id_stride", 10**9),
        (None, "model_type", ["internvl_chat"]),
        # found by tools/fuzz.py: larger than any float, longer than a screen
        (None, "downsample_ratio", 10**400),
        ("llm_config", "rope_theta", -(10**400)),
        (None, "model_type", "x" * 100_000),
        (None, "ps_version", "x" * 100_000),
        ("llm_config", "architectures", ["x" * 100_000]),
        ("llm_config", "rope_scaling", {"type": "x" * 100_000, "factor": 2.0}),
    ],
)
def test_odd_values_are_named(tmp_path, section, key, value):
    folder = golden_copy(tmp_path / "hf")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    (values[section] if section else values)[key] = value
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: ") as error:
        read_architecture(folder)
    short = {"num_key_value_heads": "heads", "architectures": "architecture"}.get(key, key)
    assert short.removeprefix("force_").split("_")[0] in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 10_000, "\xff"])
def test_what_is_no_json_object_is_named(tmp_path, text):
    folder = golden_copy(tmp_path / "hf")
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_architecture(folder)


def test_whole_numbers_may_be_written_with_a_point(tmp_path):
    folder = golden_copy(tmp_path / "hf")
    edit_config(folder, llm_config={"vocab_size": 600.0})
    assert read_architecture(folder).language.vocab_size == 600


def keys_read():
    """Keys that `need`, `get`, `choice` and `section` are called with in config/."""
    for path in CONFIG.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                if node.func.attr in ("need", "choice", "section") and isinstance(first, ast.Constant):
                    yield str(first.value)


def test_every_key_that_is_read_has_a_rule():
    assert set(keys_read()) - set(VALUES) - FREE == set()
