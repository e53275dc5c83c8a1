"""What a Hugging Face InternVL2 folder says about its model, read from `config.json` and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_v2pe.config.position_modes import POSITION_MODES, PositionMode
from megatron_v2pe.config.pyramid import PyramidArchitecture, parse_pyramid
from megatron_v2pe.config.rope_scaling import RopeScaling, parse_rope_scaling
from megatron_v2pe.config.section import Section
from megatron_v2pe.config.vision_architecture import VisionArchitecture, count_patches
from megatron_v2pe.core.errors import CheckpointError

LANGUAGE_ARCHITECTURES = ("InternLM2ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM")


@dataclass(frozen=True, kw_only=True)
class LanguageArchitecture:
    """Decoder-only language model with rotary positions, grouped-query attention and a gated silu MLP.

    Attributes:
        qkv_bias: queries, keys and values have a bias (Qwen2); no other linear has one in any family.
        tie_word_embeddings: the head is the embedding; the folder has no tensor for it.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    pad_token_id: int

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class InternVLArchitecture:
    """A whole InternVL2 model.

    Attributes:
        image_size: tile size S in pixels (`force_image_size`, or the vision tower's own).
        position_mode: `rope_pos_id_version` of the config in our names, `default` when absent.
        position_stride: `rope_pos_id_stride`, 0 when absent.
        dtype: `torch_dtype` of the checkpoint's weights.
        pyramid: smaller branches around the vision tower (PIIP), None for InternVL2's tower alone.
    """

    vision: VisionArchitecture
    language: LanguageArchitecture
    image_size: int
    downsample_ratio: float
    pixel_shuffle_version: Literal["v1", "v2"]
    select_layer: int
    template: str
    position_mode: PositionMode
    position_stride: int
    dtype: Literal["float32", "bfloat16", "float16"]
    pyramid: PyramidArchitecture | None = None

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Pixels of a tile's side in every branch of the vision tower, the large one first."""
        smaller = self.pyramid.branches if self.pyramid else ()
        return (self.image_size, *(branch.image_size for branch in smaller))

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: 256 for 448 px, patch 14, ratio 0.5."""
        return int((self.image_size // self.vision.patch_size) ** 2 * self.downsample_ratio**2)

    @property
    def patches_per_tile(self) -> int:
        """Rows that the vision tower computes for one tile: 1,025 for 448 px and patch 14, class token included."""
        return count_patches(self.image_size, self.vision.patch_size)

    @property
    def projector_width(self) -> int:
        """Channels after the pixel shuffle, the input of the projector."""
        return self.vision.hidden_size * round(1 / self.downsample_ratio) ** 2


def read_architecture(folder: str | Path) -> InternVLArchitecture:
    """Read `config.json` of a Hugging Face InternVL2 folder.

    Raises:
        CheckpointError: the file is missing or not json, a key is missing, or the family is unknown.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; give the folder of a Hugging Face InternVL2 checkpoint"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid json ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a json object")
    return parse_architecture(values, str(path))


def parse_architecture(values: dict[str, Any], path: str = "config.json") -> InternVLArchitecture:
    """Build the architecture from the contents of a config.json; see `read_architecture`."""
    top = Section(values, path)
    if top.get("model_type", "") != "internvl_chat":
        raise CheckpointError(
            f"{path}: model_type is {top.get('model_type', None)!r}, only 'internvl_chat' (InternVL2) is supported"
        )
    mode = POSITION_MODES[top.choice("rope_pos_id_version", "default", tuple(POSITION_MODES))]
    vision = top.section("vision_config")
    image_size = int(top.get("force_image_size", vision.get("image_size", 448)))
    tower = _parse_vision(vision)
    pyramid = (
        parse_pyramid(top.section("piip_config"), tower, image_size=image_size)
        if "piip_config" in values
        else None
    )
    return InternVLArchitecture(
        pyramid=pyramid,
        vision=tower,
        language=_parse_language(top.section("llm_config")),
        image_size=image_size,
        downsample_ratio=float(top.get("downsample_ratio", 0.5)),
        pixel_shuffle_version=top.choice("ps_version", "v1", ("v1", "v2")),
        # Of no InternVL2 the projector reads an inner layer of the tower.
        select_layer=top.choice("select_layer", -1, (-1,)),
        template=str(top.get("template", "")),
        position_mode=mode,
        position_stride=int(top.get("rope_pos_id_stride", 0)),
        dtype=top.choice("torch_dtype", "bfloat16", ("float32", "bfloat16", "float16")),
    )


def _parse_vision(vision: Section) -> VisionArchitecture:
    return VisionArchitecture(
        hidden_size=int(vision.need("hidden_size")),
        num_layers=int(vision.need("num_hidden_layers")),
        num_heads=int(vision.need("num_attention_heads")),
        ffn_size=int(vision.need("intermediate_size")),
        image_size=int(vision.get("image_size", 448)),
        patch_size=int(vision.get("patch_size", 14)),
        norm_type=vision.choice("norm_type", "rms_norm", ("layer_norm", "rms_norm")),
        norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(vision.get("qkv_bias", False)),
        qk_normalization=bool(vision.get("qk_normalization", True)),
    )


def _parse_language(language: Section) -> LanguageArchitecture:
    (name, *_) = language.get("architectures", ["?"])
    if name not in LANGUAGE_ARCHITECTURES:
        raise CheckpointError(
            f"{language.path}: architecture {name!r} is not supported; known: {', '.join(LANGUAGE_ARCHITECTURES)}"
        )
    _refuse_variants(language, name)
    hidden_size, num_heads = int(language.need("hidden_size")), int(language.need("num_attention_heads"))
    return LanguageArchitecture(
        architecture=name,
        hidden_size=hidden_size,
        num_layers=int(language.need("num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(language.get("num_key_value_heads", num_heads)),
        ffn_size=int(language.need("intermediate_size")),
        vocab_size=int(language.need("vocab_size")),
        norm_eps=float(language.get("rms_norm_eps", 1e-6)),
        rope_theta=float(language.get("rope_theta", 10000.0)),
        rope_scaling=parse_rope_scaling(language, head_dim=hidden_size // num_heads),
        max_position_embeddings=int(language.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
        qkv_bias=name == "Qwen2ForCausalLM",  # by the class, no key says so
        pad_token_id=int(language.get("pad_token_id", 0)),
    )


def _refuse_variants(language: Section, name: str) -> None:
    """Refuse what these architectures can have and no InternVL2 has, rather than compute something else."""
    language.choice("hidden_act", "silu", ("silu",))
    # Phi-3 carries attention_bias and does not read it.
    biases = {"InternLM2ForCausalLM": ("bias",), "LlamaForCausalLM": ("attention_bias", "mlp_bias")}
    for key in biases.get(name, ()):
        language.choice(key, False, (False,))
    language.choice("partial_rotary_factor", 1.0, (1.0,))
    head_dim = int(language.need("hidden_size")) // int(language.need("num_attention_heads"))
    language.choice("head_dim", head_dim, (head_dim,))
    longest = int(language.get("max_position_embeddings", 2048))
    has_window = language.get("use_sliding_window", name == "Phi3ForCausalLM")
    window = language.get("sliding_window", longest) if has_window else longest
    if window < longest:
        raise CheckpointError(
            f"{language.path}: sliding_window is {window}, shorter than max_position_embeddings {longest}; attention "
            "here always sees the whole document, so this checkpoint would give other numbers"
        )
