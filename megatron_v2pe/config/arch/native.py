"""config.json of a native (-hf) folder in the words of a GitHub folder, and back.

    InternVLForConditionalGeneration --github_config--> InternVLChatModel --native_config--> ...

Both describe one model. What one format cannot say is refused rather than lost: the epsilon of the tower's q/k norm
(fixed at 1e-6 in native folders), an inner feature layer, a language class that transformers does not have.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron_v2pe.config.arch.families import FAMILIES, NATIVE_FAMILIES, REFUSED
from megatron_v2pe.config.arch.rope_scaling import flat_rope
from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened

FolderFormat = Literal["github", "hf-native"]
"""`InternVLChatModel` with code of its own, or `InternVLForConditionalGeneration` of transformers."""

GITHUB_TYPE, NATIVE_TYPE = "internvl_chat", "internvl"
NATIVE_QK_NORM_EPS = 1e-6
"""transformers' InternVL tower normalises queries and keys with this, whatever its `layer_norm_eps` is."""

SOURCE_CLASS, SOURCE_TYPE = "github_architecture", "github_model_type"
"""Keys of a native text_config that this package writes where the class differs, so that the way back is the same."""

_SHARED_VISION = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"),
    *("norm_type", "layer_norm_eps", "hidden_act", "attention_dropout", "initializer_range"),
)
_ONLY_GITHUB = (
    "architectures",
    "model_type",
    "auto_map",
    "moe_config",
    "torch_dtype",
    "dtype",
    "rope_scaling",
)
_CLASS_KEYS = {"bias", "qkv_bias", "attn_implementation", "use_bfloat16", "use_flash_attn"}
"""Keys of GitHub's language classes that no class of transformers reads."""


def github_config(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A native config.json as the GitHub one of the same model.

    Raises:
        CheckpointError: the model is none that a GitHub folder can hold, or not an InternVL.
    """
    top = Section(values, path)
    top.choice("projector_hidden_act", "gelu", ("gelu",))
    top.choice("vision_feature_select_strategy", "default", ("default",))
    vision = top.section("vision_config")
    image_size = _square(vision, "image_size", 448)
    top.choice("vision_feature_layer", -1, (-1,))  # of no InternVL the projector reads an inner layer
    num_tokens = _tokens_per_tile(
        image_size, _square(vision, "patch_size", 14), top.get("downsample_ratio", 0.5)
    )
    top.choice("image_seq_length", num_tokens, (num_tokens,))
    language = _github_language(top.section("text_config"))
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": GITHUB_TYPE,
        "downsample_ratio": top.get("downsample_ratio", 0.5),
        "dynamic_image_size": True,
        "force_image_size": image_size,
        "llm_config": language,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": top.get("vision_feature_layer", -1),
        "template": FAMILIES[language["architectures"][0]].template,
        "tie_word_embeddings": bool(top.section("text_config").get("tie_word_embeddings", False)),
        "torch_dtype": _dtype(top),
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": _github_vision(vision, image_size),
    }


def _github_vision(vision: Section, image_size: int) -> dict[str, Any]:
    vision.choice("model_type", "internvl_vision", ("internvl_vision",))
    vision.choice("use_mean_pooling", True, (True,))  # false adds a final norm, which no InternVL has
    vision.choice("use_absolute_position_embeddings", True, (True,))
    vision.choice("use_mask_token", False, (False,))
    if vision.get("use_qk_norm", False):
        vision.choice("layer_norm_eps", NATIVE_QK_NORM_EPS, (NATIVE_QK_NORM_EPS,))
    defaults = {"norm_type": "layer_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    shared = {key: vision.get(key, defaults.get(key)) for key in _SHARED_VISION}
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **{key: value for key, value in shared.items() if value is not None},
        "dropout": 0.0,
        "drop_path_rate": 0.0,
        "image_size": image_size,
        "patch_size": _square(vision, "patch_size", 14),
        "qkv_bias": bool(vision.get("attention_bias", False)),
        "qk_normalization": bool(vision.get("use_qk_norm", False)),
        "initializer_factor": vision.get("layer_scale_init_value", 0.1),
        "torch_dtype": _dtype(vision),
    }


def _square(section: Section, key: str, default: int) -> int:
    """A side in pixels, written as one number or as height and width."""
    value = section.get(key, default)
    sides = value if isinstance(value, list) else [value]
    if len(set(sides)) != 1:
        raise CheckpointError(f"{section.path}: {key} is {value}, but tiles and patches are square")
    return int(sides[0])


def _tokens_per_tile(image_size: int, patch_size: int, downsample_ratio: float) -> int:
    return int((image_size // patch_size) ** 2 * downsample_ratio**2)


def _dtype(section: Section) -> str:
    return str(section.get("dtype", section.get("torch_dtype", "bfloat16")))


def _github_language(text: Section) -> dict[str, Any]:
    kind = text.need("model_type")
    if kind not in NATIVE_FAMILIES:
        (name, *_) = text.get("architectures", ["?"])
        reason = REFUSED.get(name, f"known are {', '.join(NATIVE_FAMILIES)}")
        raise CheckpointError(f"{text.path}: model_type {shortened(kind)} is not supported; {reason}")
    family = FAMILIES[text.choice(SOURCE_CLASS, NATIVE_FAMILIES[kind].architecture, tuple(FAMILIES))]
    values = {**text.values, "architectures": [family.architecture]}
    if values.pop(SOURCE_CLASS, None):
        values["model_type"] = values.pop(SOURCE_TYPE, kind)
        for key in family.native_values:
            values.pop(key, None)
    values["torch_dtype"] = _dtype(text)
    values.pop("dtype", None)
    values = dict(flat_rope(Section(values, text.path)).values)
    if family.experts[:1] == ("num_experts",) and "num_local_experts" in values:
        count = values["num_local_experts"]
        if values.get("num_experts") in (None, count):  # else both stay, and are refused together
            values["num_experts"] = values.pop("num_local_experts")
    return values


def native_config(values: dict[str, Any], path: str, *, image_token_id: int) -> dict[str, Any]:
    """A GitHub config.json as the native one of the same model.

    Args:
        values: contents of config.json.
        path: for messages.
        image_token_id: id of `<IMG_CONTEXT>` in the folder's tokenizer.

    Raises:
        CheckpointError: transformers has no class for the model, or cannot say something about it.
    """
    top = Section(values, path)
    top.choice("ps_version", "v1", ("v2",))  # transformers has this order of rows alone
    vision, language = top.section("vision_config"), top.section("llm_config")
    image_size = int(top.get("force_image_size", vision.get("image_size", 448)))
    ratio, patch = float(top.get("downsample_ratio", 0.5)), int(vision.get("patch_size", 14))
    dtype = _dtype(top)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": ratio,
        "dtype": dtype,
        "image_seq_length": _tokens_per_tile(image_size, patch, ratio),
        "image_token_id": image_token_id,
        "model_type": NATIVE_TYPE,
        "projector_hidden_act": "gelu",
        "text_config": _native_language(language, dtype),
        # The class's own default is true in transformers 5; what counts is the language model's key.
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
        "vision_config": _native_vision(vision, dtype),
        "vision_feature_layer": top.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
    }


def _native_vision(vision: Section, dtype: str) -> dict[str, Any]:
    has_qk_norm = bool(vision.get("qk_normalization", True))
    if has_qk_norm:
        vision.choice("layer_norm_eps", NATIVE_QK_NORM_EPS, (NATIVE_QK_NORM_EPS,))
    image_size, patch_size = int(vision.get("image_size", 448)), int(vision.get("patch_size", 14))
    defaults = {"norm_type": "rms_norm", "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
    shared = {key: vision.get(key, defaults.get(key)) for key in _SHARED_VISION}
    return {
        "architectures": ["InternVLVisionModel"],
        "attention_bias": bool(vision.get("qkv_bias", False)),
        "dtype": dtype,
        "hidden_dropout_prob": 0.0,
        "image_size": [image_size, image_size],
        "layer_scale_init_value": vision.get("initializer_factor", 0.1),
        "model_type": "internvl_vision",
        "patch_size": [patch_size, patch_size],
        "projection_dropout": 0.0,
        **{key: value for key, value in shared.items() if value is not None},
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": has_qk_norm,
    }


def _native_language(language: Section, dtype: str) -> dict[str, Any]:
    language = flat_rope(language)
    (name, *_) = language.get("architectures", ["?"])
    family = FAMILIES.get(name)
    if family is None or not family.native_model_type:
        raise CheckpointError(
            f"{language.path}: {name} has no native folder, because transformers' InternVL does not carry it; export "
            "with --format github"
        )
    kept = {
        key: value
        for key, value in language.values.items()
        if key not in _ONLY_GITHUB and key not in _CLASS_KEYS
    }
    scaling = dict(language.get("rope_scaling", {}))
    kind = scaling.pop("type", scaling.get("rope_type", "default"))
    scaling["rope_type"] = scaling.get("rope_type", kind)
    native_class = NATIVE_FAMILIES[family.native_model_type].architecture
    source = {SOURCE_CLASS: name, SOURCE_TYPE: language.get("model_type", "")} if native_class != name else {}
    return {
        **kept,
        **family.native_values,
        **source,
        "architectures": [native_class],
        "dtype": dtype,
        "model_type": family.native_model_type,
        # Both spellings of the rotary settings: transformers 4 reads the first two keys, 5 the third.
        "rope_theta": float(language.get("rope_theta", 10000.0)),
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": {"rope_theta": float(language.get("rope_theta", 10000.0)), **scaling},
        "tie_word_embeddings": bool(language.get("tie_word_embeddings", False)),
    }
