"""What each value of a config.json may be: type and bounds, by key, in one table.

    Section.need/get --key--> VALUES --> the value, of its type     or one error that names file, key, value, rule

A config.json comes from anywhere. A hidden size of 0 is a division by zero later, 1e12 layers are a hang, an epsilon of
NaN trains nothing: each is refused where it is read. Bounds are far outside of what any published model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reader = Callable[[Any], Any]
"""Gives the value in its type; raises ValueError with the rule that it breaks."""

_SHOWN = 60


def _whole(low: int, high: int) -> Reader:
    def read(value: Any) -> int:
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        if not is_whole or not low <= value <= high:
            raise ValueError(f"a whole number in {low:,}..{high:,}")
        return int(value)

    return read


def _real(low: float, high: float, *, is_low_allowed: bool = True) -> Reader:
    def read(value: Any) -> float:
        is_number = type(value) in (
            int,
            float,
        )  # a whole one may be too large for a float; NaN is in no range
        if not is_number or not low <= value <= high or (value == low and not is_low_allowed):
            bracket = "[" if is_low_allowed else "("
            raise ValueError(f"a finite number in {bracket}{low:g}, {high:g}]")
        return float(value)

    return read


def _flag(value: Any) -> bool:
    if type(value) is bool or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise ValueError("true or false")


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 2**20:
        raise ValueError("a text")
    return value


def _one_of(*names: str) -> Reader:
    def read(value: Any) -> str:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return str(value)

    return read


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def _list(item: Reader, *, most: int) -> Reader:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"a list of at most {most:,} values")
        try:
            return [item(each) for each in value]
        except ValueError as error:
            raise ValueError(f"a list, each value of it {error}") from None

    return read


def _names(value: Any) -> list[str]:
    names: list[str] = _list(_text, most=1024)(value)
    if not names:
        raise ValueError("a list of at least one name")
    return names


def _side(value: Any) -> Any:
    """Of a square: one number, or height and width (native folders), which are equal."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    numbers = {_whole(1, 16384)(side) for side in sides}
    if len(numbers) > 1:
        raise ValueError("two equal numbers, as tiles and patches are square")
    return numbers.pop()


_COUNT = _whole(1, 1024)
_WIDTH = _whole(1, 2**18)
_LENGTH = _whole(1, 2**40)
_EPS = _real(0.0, 1.0, is_low_allowed=False)

VALUES: dict[str, Reader] = {
    # sizes
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _COUNT),
    **dict.fromkeys(("hidden_size", "head_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), _whole(1, 2**22)),
    **dict.fromkeys(("image_size", "force_image_size", "patch_size"), _side),
    "max_position_embeddings": _LENGTH,
    "original_max_position_embeddings": _whole(2, 2**40),
    "vocab_size": _whole(1, 2**24),
    "sliding_window": _whole(0, 2**40),
    "num_channels": _COUNT,
    "pad_token_id": _whole(-1, 2**31),
    "image_token_id": _whole(0, 2**31),
    "image_seq_length": _whole(1, 2**20),
    **dict.fromkeys(("num_experts", "num_local_experts"), _whole(0, 1024)),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "decoder_sparse_step"), _COUNT),
    "initial_context_length": _LENGTH,
    "mlp_only_layers": _list(_whole(0, 1024), most=1024),
    "downsample_ratio": _real(0.0, 1.0, is_low_allowed=False),
    **dict.fromkeys(("select_layer", "vision_feature_layer"), _whole(-1024, 1024)),
    # numerics
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), _EPS),
    "rope_theta": _real(1.0, 1e15),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _real(0.0, 1e9, is_low_allowed=False)),
    "attention_factor": _real(0.0, 1e6, is_low_allowed=False),
    **dict.fromkeys(("beta_fast", "beta_slow"), _real(0.0, 1e6, is_low_allowed=False)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _real(0.0, 1e6)),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha"), _real(0.0, 1e6)),
    **dict.fromkeys(
        ("short_factor", "long_factor"), _list(_real(0.0, 1e9, is_low_allowed=False), most=2**16)
    ),
    "partial_rotary_factor": _real(0.0, 1.0),
    "router_aux_loss_coef": _real(0.0, 1e6),
    **dict.fromkeys(("initializer_factor", "layer_scale_init_value", "initializer_range"), _real(-1e6, 1e6)),
    # switches
    **dict.fromkeys(("qkv_bias", "bias", "attention_bias", "mlp_bias"), _flag),
    **dict.fromkeys(("qk_normalization", "use_qk_norm", "tie_word_embeddings", "norm_topk_prob"), _flag),
    "truncate": _flag,
    **dict.fromkeys(("use_sliding_window", "use_mean_pooling", "use_mask_token"), _flag),
    "use_absolute_position_embeddings": _flag,
    # names
    **dict.fromkeys(("model_type", "template", "ps_version", "norm_type", "hidden_act"), _text),
    **dict.fromkeys(("torch_dtype", "dtype", "rope_type", "type", "rope_pos_id_version"), _text),
    **dict.fromkeys(("projector_hidden_act", "vision_feature_select_strategy"), _text),
    "architectures": _names,
    "layer_types": _list(_text, most=1024),
    # parts
    **dict.fromkeys(
        ("vision_config", "llm_config", "text_config", "rope_scaling", "rope_parameters"), _object
    ),
    # what was trained
    "rope_pos_id_stride": _whole(0, 2**20),
    **dict.fromkeys(("min_dynamic_patch", "max_dynamic_patch"), _COUNT),
    **dict.fromkeys(("dynamic_image_size", "use_thumbnail", "pad2square"), _flag),
    "normalize_type": _one_of("imagenet", "clip", "siglip"),
    "system_message": _text,
    "max_trained_tokens": _LENGTH,
}
"""Key -> what its value may be; null counts as absent and is not asked."""


def read_value(key: str, value: Any) -> Any:
    """The value of a key in its type.

    Raises:
        ValueError: it breaks the rule of the key; the message ends a sentence "KEY is VALUE, ...".
    """
    reader = VALUES.get(key)
    if reader is None:
        return value
    try:
        return reader(value)
    except ValueError as error:
        text = repr(value)
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"
        raise ValueError(f"{key} is {shown}, but must be {error}") from None
