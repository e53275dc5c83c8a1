"""Native (-hf) folders: import and export byte for byte, conversion either way bit for bit, and what is refused."""

import json
import logging
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.convert.other_format import convert_hf
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.trained_settings import answer_data
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.data.text.byte_level import read_tokenizer_json
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from megatron_v2pe.verification.bits import verify
from tests.support.hf_folders import FAMILIES_GOLDEN, folder_bytes

GITHUB, NATIVE = FAMILIES_GOLDEN / "ckpt", FAMILIES_GOLDEN / "ckpt_hf"
QWEN3_6B, MOE, INTERNLM2 = "i_qwen3_vit6b", "j_qwen3moe_vit300m", "n_internlm2_vit300m"
GPT_OSS = "l_gptoss_vit300m"
NESTED = {
    "model.language_model.": "language_model.model.",
    "model.": "",
    "lm_head.": "language_model.lm_head.",
}


def tensors(folder):
    """All tensors; the spelling of transformers 5 brought to the published one."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            prefix = next((each for each in NESTED if name.startswith(each)), None)
            found[NESTED[prefix] + name.removeprefix(prefix) if prefix else name] = tensor
    return found


def equal(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    "key", [QWEN3_6B, MOE, GPT_OSS], ids=["nested names", "published names", "stacked experts"]
)
def test_a_native_folder_comes_back_byte_for_byte(tmp_path, key):
    import_hf(NATIVE / key, tmp_path / "ckpt")
    assert verify(NATIVE / key, tmp_path / "ckpt").is_equal
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(NATIVE / key)


@pytest.mark.parametrize("key", [QWEN3_6B, MOE, GPT_OSS])
def test_both_formats_hold_the_same_weights(tmp_path, key):
    assert convert_hf(GITHUB / key, tmp_path / "hf") == "hf-native"
    assert equal(tensors(tmp_path / "hf"), tensors(NATIVE / key))
    assert convert_hf(NATIVE / key, tmp_path / "github") == "github"
    assert equal(tensors(tmp_path / "github"), tensors(GITHUB / key))


@pytest.mark.parametrize("key", [QWEN3_6B, MOE, INTERNLM2, GPT_OSS])
def test_there_and_back_through_checkpoints(tmp_path, key):
    """GitHub -> ours -> -hf -> ours -> GitHub; InternLM2, a llama in between, is InternLM2 again."""
    import_hf(GITHUB / key, tmp_path / "first")
    export_hf(tmp_path / "first", tmp_path / "hf", to="hf-native")
    import_hf(tmp_path / "hf", tmp_path / "second")
    export_hf(tmp_path / "second", tmp_path / "github", to="github")
    assert equal(tensors(tmp_path / "github"), tensors(GITHUB / key))
    there, back = read_architecture(GITHUB / key), read_architecture(tmp_path / "github")
    assert there == back
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"):
        if (GITHUB / key / name).is_file():
            assert (tmp_path / "github" / name).read_bytes() == (GITHUB / key / name).read_bytes()
    ids = load_tokenizer(tmp_path / "github").encode("<img></img> a dog")
    assert ids == load_tokenizer(GITHUB / key).encode("<img></img> a dog")


def test_norms_of_the_6b_towers_queries_and_keys_survive(tmp_path):
    """The release's converter drops them; they are not 1 here, so a lost one would show."""
    convert_hf(GITHUB / QWEN3_6B, tmp_path / "hf")
    before, after = tensors(GITHUB / QWEN3_6B), tensors(tmp_path / "hf")
    for layer in range(2):
        for side in "qk":
            norm = before[f"vision_model.encoder.layers.{layer}.attn.{side}_norm.weight"]
            assert not bool((norm == 1).all())
            assert torch.equal(
                after[f"vision_tower.encoder.layer.{layer}.attention.{side}_norm.weight"], norm
            )


def test_a_folder_that_lost_them_is_warned_of(tmp_path, caplog):
    folder = shutil.copytree(NATIVE / QWEN3_6B, tmp_path / "lost", copy_function=shutil.copyfile)
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: torch.ones_like(t) if "vision" in name and "_norm" in name else t for name, t in weights.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        convert_hf(folder, tmp_path / "github")
    assert "is exactly 1, as in folders that the release's converter made" in caplog.text


def test_processor_files_of_a_converted_folder(tmp_path):
    convert_hf(GITHUB / MOE, tmp_path / "hf")
    config, wanted = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", NATIVE / MOE)
    )
    for key in ("image_token_id", "image_seq_length", "downsample_ratio", "model_type", "architectures"):
        assert config[key] == wanted[key]
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["num_experts"] == 8
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "hf", NATIVE / MOE))
        assert {key: ours[key] for key in theirs} == theirs
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["extra_special_tokens"]["context_image_token"] == "<IMG_CONTEXT>"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 354


def test_sentencepiece_as_tokenizer_json(tmp_path):
    """The library gives the ids of InternLM2's own tokenizer; the token for videos is in no text."""
    import tokenizers

    convert_hf(GITHUB / INTERNLM2, tmp_path / "hf")
    names = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert names["video_token"] == "<unk>"
    assert "'<unk>\\n'" in (tmp_path / "hf" / "chat_template.jinja").read_text()
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    slow = load_tokenizer(GITHUB / INTERNLM2)
    for text in ("a dog", "  two  dogs\n", "<img></img><|im_end|>\n", "\u4e09\u6761\u8239 \U0001f600", ""):
        assert fast.encode(text).ids == slow.encode(text)


def test_gpt_oss_as_transformers_5_writes_it(tmp_path):
    """Nested names, `rope_parameters`, and no key that has its default; a window and a length of their own."""
    folder = shutil.copytree(NATIVE / GPT_OSS, tmp_path / "hf", copy_function=shutil.copyfile)
    prefixes = {plain: nested for nested, plain in NESTED.items() if plain} | {"": "model."}
    respelled = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain = next(each for each in prefixes if name.startswith(each))
        respelled[prefixes[plain] + name.removeprefix(plain)] = tensor
    save_file(respelled, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
    text["rope_parameters"] = {"rope_theta": theta, **scaling, "factor": 16.0}
    text["sliding_window"] = 11
    for key in ("layer_types", "attention_bias", "swiglu_limit", "rms_norm_eps", "head_dim"):
        text.pop(key)
    text["head_dim"] = 16
    (folder / "config.json").write_text(json.dumps(values))
    language = read_architecture(folder).language
    assert (language.window, language.is_windowed) == (11, (True, False, True, False))
    assert language.rope_scaling.factor == 16.0
    import_hf(folder, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(folder)
    assert convert_hf(folder, tmp_path / "github") == "github"
    assert read_architecture(tmp_path / "github").language == language
    assert equal(tensors(tmp_path / "github"), tensors(GITHUB / GPT_OSS))
    github = json.loads((tmp_path / "github" / "config.json").read_text())
    assert github["template"] == "internvl3_5_gpt_oss"
    assert github["llm_config"]["num_local_experts"] == 8
    convert_hf(tmp_path / "github", tmp_path / "again")
    again = read_architecture(tmp_path / "again")
    assert (again.language, again.template) == (language, "internvl3_5_gpt_oss")
    assert equal(tensors(tmp_path / "again"), tensors(folder))


def test_remote_code_is_refused_where_it_would_compute_something_else(tmp_path):
    import_hf(GITHUB / GPT_OSS, tmp_path / "gpt_oss")
    with pytest.raises(
        CheckpointError, match=r"--remote-code knows .*, but this checkpoint is a GptOssForCausalLM"
    ):
        export_hf(tmp_path / "gpt_oss", tmp_path / "out", remote_code=True)
    folder = shutil.copytree(GITHUB / MOE, tmp_path / "hf", copy_function=shutil.copyfile)
    values = json.loads((folder / "config.json").read_text())
    values["llm_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(values))
    import_hf(folder, tmp_path / "yarn")
    with pytest.raises(CheckpointError, match="--remote-code computes no YaRN"):
        export_hf(tmp_path / "yarn", tmp_path / "out", remote_code=True)
    assert not (tmp_path / "out").exists()


def test_files_of_a_converted_gpt_oss(tmp_path):
    convert_hf(GITHUB / GPT_OSS, tmp_path / "hf")
    names = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert names["video_token"] == "<|reserved_200000|>"  # in no text, unlike the end token
    chat = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert "<|channel|>final" in chat
    assert "<|im_end|>" not in chat
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 356
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "template" not in config  # the family's own
    assert config["text_config"]["rope_parameters"]["truncate"] is False


def edited(folder, tmp_path, **sections):
    copy = shutil.copytree(folder, tmp_path / "edited", copy_function=shutil.copyfile)
    values = json.loads((copy / "config.json").read_text())
    for name, changes in sections.items():
        if isinstance(changes, dict):
            values[name] |= changes
        else:
            values[name] = changes
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "model.safetensors").unlink()  # every mistake below is found in config.json
    return copy


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"text_config": {"model_type": "qwen2_moe"}}, "model_type 'qwen2_moe' is not supported"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        (
            {"text_config": {"layer_types": ["sliding_attention", "full_attention"]}},
            "layer_types has sliding",
        ),
        ({"text_config": {"rope_parameters": {"rope_type": "ntk_by_parts"}}}, "'ntk_by_parts' is unknown"),
        (
            {"text_config": {"num_experts_per_tok": 9}},
            r"num_experts_per_tok is 9, .* 2\.\.num_experts = 8",
        ),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling is False"),
        ({"vision_config": {"use_qk_norm": True, "layer_norm_eps": 1e-5}}, "layer_norm_eps is 1e-05"),
        ({"vision_config": {"image_size": [56, 112]}}, "tiles and patches are square"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_feature_layer": -4}, "vision_feature_layer is -4"),
        ({"use_vision_router": True, "model_type": "internvl_chat"}, "this is an InternVL-Flash|llm_config"),
    ],
)
def test_models_that_look_near_are_refused_before_a_weight_is_read(tmp_path, sections, words):
    with pytest.raises(CheckpointError, match=words):
        read_architecture(edited(NATIVE / MOE, tmp_path, **sections))


def test_mixed_formats_in_one_folder(tmp_path):
    folder = shutil.copytree(GITHUB / MOE, tmp_path / "mixed", copy_function=shutil.copyfile)
    shutil.copyfile(NATIVE / MOE / "config.json", folder / "config.json")
    with pytest.raises(
        CheckpointError, match=r"have names of GitHub folders .* config.json is that of native folders"
    ):
        import_hf(folder, tmp_path / "ckpt")


def test_names_of_both_formats_in_one_file(tmp_path):
    folder = shutil.copytree(NATIVE / MOE, tmp_path / "mixed", copy_function=shutil.copyfile)
    both = load_file(GITHUB / MOE / "model.safetensors") | load_file(folder / "model.safetensors")
    save_file(both, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"have names of GitHub folders .* config.json is that of native folders"
    ):
        import_hf(folder, tmp_path / "ckpt")


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.pre_feedforward_layernorm.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.model.layers.0.self_attn.sinks",
        "language_model.model.layers.1.mlp.gate.e_score_correction_bias",
    ],
    ids=["norm", "bias", "sinks", "router bias"],
)
@pytest.mark.parametrize("folder", [GITHUB, NATIVE], ids=["github", "native"])
def test_a_tensor_that_the_family_does_not_have_is_refused_by_name(tmp_path, folder, name):
    """The names of the files are compared before a weight is read."""
    copy = shutil.copytree(folder / MOE, tmp_path / "near", copy_function=shutil.copyfile)
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, name: torch.ones(8)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(f"{name}: this architecture has no such tensor")):
        import_hf(copy, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_format_that_the_folder_has_already(tmp_path):
    with pytest.raises(CheckpointError, match="has the format github already"):
        convert_hf(GITHUB / MOE, tmp_path / "out", to="github")


@pytest.fixture
def tokenizer_json_alone(tmp_path):
    """A native InternLM2 folder as published: its tokenizer.json is all there is of the vocabulary."""
    convert_hf(GITHUB / INTERNLM2, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    path = tmp_path / "hf" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("github_tokenizer_class")
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return tmp_path / "hf"


def test_a_native_folder_of_internlm_with_tokenizer_json_alone(tmp_path, tokenizer_json_alone):
    ours, slow = load_tokenizer(tokenizer_json_alone), load_tokenizer(GITHUB / INTERNLM2)
    texts = ("a dog", "  two  dogs\n", "<img></img><|im_end|>\n", "\u4e09\u6761\u8239 \U0001f600", "", " ")
    for text in texts:
        assert ours.encode(text) == slow.encode(text)
        assert pickle.loads(pickle.dumps(ours)).encode(text) == slow.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == slow.decode(
            slow.encode(text), skip_special_tokens=True
        )
    spelled = "x<|im_end|>y"  # of a record: text, not the end of an answer
    ids, _ = ours.encode_marked(spelled, (), written=[(0, len(spelled))])
    assert ours.token_id("<|im_end|>") not in ids
    assert ids == slow.encode_marked(spelled, (), written=[(0, len(spelled))])[0]
    import_hf(tokenizer_json_alone, tmp_path / "ckpt")
    assert verify(tokenizer_json_alone, tmp_path / "ckpt").is_equal


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "_",
                "prepend_scheme": "first",
                "split": True,
            }
        },
        {"decoder": {"type": "Fuse"}},
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(tokenizer_json_alone, changes):
    path = tokenizer_json_alone / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="pre_tokenizer is neither ByteLevel nor Metaspace"):
        read_tokenizer_json(path)


TRAINED = {
    "template": "Hermes-2",
    "system_message": "Answer in French.",
    "max_dynamic_patch": 5,
    "use_thumbnail": False,
    "normalize_type": "siglip",
    "max_trained_tokens": 32768,
}


def test_how_a_run_trained_travels_into_the_other_format_and_back(tmp_path):
    source = tmp_path / "github"
    shutil.copytree(GITHUB / MOE, source, copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **TRAINED}))
    convert_hf(source, tmp_path / "native")
    convert_hf(tmp_path / "native", tmp_path / "back")
    for folder in ("native", "back"):
        arch, data = read_architecture(tmp_path / folder), answer_data(tmp_path / folder)
        assert (arch.template, arch.system_message) == (TRAINED["template"], TRAINED["system_message"])
        assert arch.trained_length == 32768
        assert (data.max_dynamic_patch, data.use_thumbnail, data.normalize_type) == (5, False, "siglip")


def test_an_image_token_of_another_tokenizer_is_warned_of(tmp_path, caplog):
    """As the converter of transformers writes it for InternLM3; what is used is the tokenizer's."""
    folder = shutil.copytree(NATIVE / MOE, tmp_path / "hf", copy_function=shutil.copyfile)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"image_token_id": 92546}))
    with caplog.at_level(logging.WARNING):
        import_hf(folder, tmp_path / "ckpt")
    assert "image_token_id of config.json is 92546, but <IMG_CONTEXT> is 380 in the tokenizer" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        import_hf(NATIVE / MOE, tmp_path / "right")
    assert "image_token_id" not in caplog.text
