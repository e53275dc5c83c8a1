"""What a Hugging Face InternVL folder says about its model, read from `config.json` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_v2pe.config.arch.families import FAMILIES, REFUSED, LanguageFamily
from megatron_v2pe.config.arch.native import GITHUB_TYPE, NATIVE_TYPE, FolderFormat, github_config
from megatron_v2pe.config.arch.pyramid import GROUPS, PyramidArchitecture, parse_pyramid
from megatron_v2pe.config.arch.refusals import (
    refuse_flash,
    refuse_nulls,
    refuse_variants,
    refuse_vision_variants,
)
from megatron_v2pe.config.arch.rope_scaling import RopeScaling, flat_rope, parse_rope_scaling
from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture, count_patches
from megatron_v2pe.config.position_modes import POSITION_MODES, PositionMode
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.core.plain_files import read_json_object

_WINDOWED, _WHOLE = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class ExpertsArchitecture:
    """Mixture of experts in some layers of the language model.

    Attributes:
        num_experts: E of each sparse layer.
        top_k: experts that a token goes to.
        ffn_size: MLP channels of one expert.
        is_sparse: for each layer whether it has experts in the place of its MLP.
        normalizes_top_k: the weights of a token's experts sum to one; false takes them from the softmax over all.
        aux_loss_coefficient: `router_aux_loss_coef`, strength of the load balancing loss that the checkpoint names.
        clamp: limit of the clamped SwiGLU of GPT-OSS, whose router and experts have biases; 0 where experts are plain
            silu MLPs without biases.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    is_sparse: tuple[bool, ...]
    normalizes_top_k: bool
    aux_loss_coefficient: float
    clamp: float = 0.0

    @property
    def is_clamped(self) -> bool:
        """Whether router and experts are those of GPT-OSS."""
        return self.clamp > 0.0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts, 0-based."""
        return tuple(i for i, sparse in enumerate(self.is_sparse) if sparse)


@dataclass(frozen=True, kw_only=True)
class LanguageArchitecture:
    """Decoder-only language model with rotary positions, grouped-query attention and a gated MLP.

    Attributes:
        head_dim: channels of one attention head.
        qkv_bias: queries, keys and values have a bias (Qwen2, GPT-OSS).
        proj_bias: the output projection of attention has a bias (GPT-OSS).
        qk_norm: queries and keys of each head are normalised before the rotation (Qwen3).
        sinks: each query head has a learned logit that joins its softmax and has no value (GPT-OSS).
        window: tokens that a windowed layer sees of its document, each token itself included; 0 without such layers.
        is_windowed: for each layer whether it is one; empty without such layers.
        tie_word_embeddings: the head is the embedding; the folder has no tensor for it.
        experts: mixture of experts; None where every layer has one MLP.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    proj_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    window: int = 0
    is_windowed: tuple[bool, ...] = ()
    pad_token_id: int
    experts: ExpertsArchitecture | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.is_sparse[layer]

    @property
    def num_windowed(self) -> int:
        """Layers that see a window of their document."""
        return sum(self.is_windowed)

    def kv_heads_of_rank(self, tp: int) -> int:
        """KV heads whose keys and values a tensor parallel rank has."""
        return max(1, self.num_kv_heads // tp)

    @property
    def attention_weights(self) -> int:
        """Weights of the linears of one layer's attention."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys)

    @property
    def active_weights(self) -> int:
        """Weights of linears that one token meets in all decoder layers: of the experts those it goes to."""
        dense = 3 * self.hidden_size * self.ffn_size
        if self.experts is None:
            return self.num_layers * (self.attention_weights + dense)
        experts = self.experts
        chosen = self.hidden_size * (3 * experts.top_k * experts.ffn_size + experts.num_experts)
        num_sparse = len(experts.sparse_layers)
        mlps = num_sparse * chosen + (self.num_layers - num_sparse) * dense
        return self.num_layers * self.attention_weights + mlps


@dataclass(frozen=True, kw_only=True)
class InternVLArchitecture:
    """A whole InternVL model.

    Attributes:
        image_size: tile size S in pixels (`force_image_size`, or the vision tower's own).
        position_mode: `rope_pos_id_version` of the config in our names, `default` when absent.
        position_stride: `rope_pos_id_stride`, 0 when absent.
        system_message: system text of answers; empty is the template's.
        trained_tokens: longest sample of the run that trained it (`max_trained_tokens`), 0 when absent.
        dtype: `torch_dtype` of the checkpoint's weights.
        folder_format: the format whose config.json this was.
        image_token_id: id of `<IMG_CONTEXT>` as a native config.json says it; None where it does not.
        pyramid: smaller branches around the vision tower (PIIP), None for InternVL's tower alone.
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
    folder_format: FolderFormat = "github"
    system_message: str = ""
    trained_tokens: int = 0
    image_token_id: int | None = None
    pyramid: PyramidArchitecture | None = None

    @property
    def trained_length(self) -> int:
        """Tokens of the longest sample that was trained; what config.json allows, where no run recorded it."""
        return self.trained_tokens or self.language.max_position_embeddings

    @property
    def tile_sizes(self) -> tuple[int, ...]:
        """Pixels of a tile's side in every branch of the vision tower, the large one first."""
        smaller = self.pyramid.branches if self.pyramid else ()
        return (self.image_size, *(branch.image_size for branch in smaller))

    @property
    def values_per_tile(self) -> int:
        """Pixel values of a tile in all branches together."""
        return sum(3 * size**2 for size in self.tile_sizes)

    @property
    def tokens_per_tile(self) -> int:
        """T, visual tokens of one tile: 256 for 448 px, patch 14, ratio 0.5; a pyramid's readout may give others.

        Lengths, packs, positions (units of 1/T, strides 1..T), routes and caches all follow from this number.
        """
        if self.reads_all_branches:
            assert self.pyramid is not None
            return self.pyramid.token_side**2
        return int((self.image_size // self.vision.patch_size) ** 2 * self.downsample_ratio**2)

    @property
    def reads_all_branches(self) -> bool:
        """Whether LLaVA's readout of a pyramid takes the place of InternVL's pixel shuffle and projector."""
        return self.pyramid is not None and self.pyramid.reads_all

    @property
    def patches_per_tile(self) -> int:
        """Rows that the vision tower computes for one tile: 1,025 for 448 px and patch 14, class token included."""
        return count_patches(self.image_size, self.vision.patch_size)

    @property
    def projector_width(self) -> int:
        """Channels after the pixel shuffle, the input of the projector."""
        return self.vision.hidden_size * round(1 / self.downsample_ratio) ** 2


def read_architecture(folder: str | Path) -> InternVLArchitecture:
    """Read `config.json` of a Hugging Face InternVL folder, of either format.

    Raises:
        CheckpointError: the file is missing or not json, a key is missing, or the family is unknown.
    """
    path = Path(folder) / "config.json"
    try:
        values = read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(_no_config(path)) from None
    arch = parse_architecture(values, str(path))
    require_consistent(arch, str(path))
    return arch


def _no_config(path: Path) -> str:
    if path.with_name("adapter_config.json").is_file():
        return (
            f"{path}: no such file, but there is adapter_config.json: this is a PEFT folder of adapters; "
            "`megatron-v2pe import-hf FOLDER CHECKPOINT --base CHECKPOINT_OF_THE_MODEL` imports it onto its model"
        )
    return f"{path}: no such file; give the folder of a Hugging Face InternVL checkpoint"


def require_consistent(arch: InternVLArchitecture, path: str = "config.json") -> None:
    """Refuse sizes that are each possible, but not together.

    Raises:
        CheckpointError: names all of them.
    """
    vision, language, shuffle = arch.vision, arch.language, 1 / arch.downsample_ratio
    side = arch.image_size // vision.patch_size
    rules = {
        f"vision hidden_size {vision.hidden_size} must be a multiple of its {vision.num_heads} heads": (
            vision.hidden_size % vision.num_heads == 0
        ),
        f"llm hidden_size {language.hidden_size} must be a multiple of its {language.num_heads} heads": (
            language.hidden_size % language.num_heads == 0
            or language.head_dim != language.hidden_size // language.num_heads
        ),
        f"head dimension {language.head_dim} must be even": language.head_dim % 2 == 0
        and language.head_dim > 0,
        f"{language.num_heads} heads must be a multiple of num_key_value_heads {language.num_kv_heads}": (
            language.num_heads % language.num_kv_heads == 0
        ),
        f"image size {arch.image_size} must be a multiple of patch_size {vision.patch_size}, and so must "
        f"vision image_size {vision.image_size}": (
            side > 0
            and arch.image_size % vision.patch_size == 0
            and vision.image_size % vision.patch_size == 0
        ),
        f"downsample_ratio {arch.downsample_ratio} must be 1 over a whole number that divides the {side} patches of "
        "a tile's side": abs(shuffle - round(shuffle)) < 1e-6 and side % round(shuffle) == 0,
        f"rope_pos_id_stride {arch.position_stride} must be at most the {arch.tokens_per_tile} visual tokens of a "
        "tile": arch.position_stride <= arch.tokens_per_tile,
        f"llm hidden_size {language.hidden_size} must be a multiple of {GROUPS} for the GroupNorm of readout 'llava' "
        "(readout_norm ln has no such rule)": _groups_divide(arch),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise CheckpointError(f"{path}: " + "; ".join(broken))


def _groups_divide(arch: InternVLArchitecture) -> bool:
    pyramid = arch.pyramid
    has_groups = pyramid is not None and pyramid.reads_all and pyramid.readout_norm == "group"
    return not has_groups or arch.language.hidden_size % GROUPS == 0


def parse_architecture(values: dict[str, Any], path: str = "config.json") -> InternVLArchitecture:
    """Build the architecture from the contents of a config.json; see `read_architecture`."""
    kind = Section(values, path).get("model_type", "")
    if kind == NATIVE_TYPE:
        if values.get("piip_config") is not None:
            raise CheckpointError(
                f"{path}: piip_config in a native folder (model_type {NATIVE_TYPE!r}); a pyramid is kept in folders of "
                f"model_type {GITHUB_TYPE!r} only"
            )
        return replace(_parse_github(_with_positions(values, path), path), folder_format="hf-native")
    if kind != GITHUB_TYPE:
        raise CheckpointError(
            f"{path}: model_type is {shortened(kind)}, only {GITHUB_TYPE!r} (GitHub folders of InternVL 2 to 3.5) and "
            f"{NATIVE_TYPE!r} (their native -hf folders) are supported"
        )
    return _parse_github(values, path)


def _with_positions(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A native config in GitHub's words, with what this package writes into either: template, positions, ..."""
    own = ("rope_pos_id_version", "rope_pos_id_stride", "template", "system_message", "max_trained_tokens")
    kept: dict[str, Any] = {key: values[key] for key in (*own, "image_token_id") if key in values}
    return {**github_config(values, path), **kept}


def _parse_github(values: dict[str, Any], path: str) -> InternVLArchitecture:
    top = Section(values, path)
    refuse_flash(top)
    mode = POSITION_MODES[top.choice("rope_pos_id_version", "default", tuple(POSITION_MODES))]
    vision = top.section("vision_config")
    image_size = int(top.get("force_image_size", vision.get("image_size", 448)))
    tower = _parse_vision(vision)
    pyramid = None
    if top.get("piip_config", None) is not None:
        pyramid = parse_pyramid(top.section("piip_config"), tower, image_size=image_size)
    return InternVLArchitecture(
        pyramid=pyramid,
        vision=tower,
        language=_parse_language(top.section("llm_config")),
        image_size=image_size,
        downsample_ratio=float(top.get("downsample_ratio", 0.5)),
        pixel_shuffle_version=top.choice("ps_version", "v1", ("v1", "v2")),
        # Of no InternVL the projector reads an inner layer of the tower.
        select_layer=top.choice("select_layer", -1, (-1,)),
        template=str(top.get("template", "")),
        system_message=str(top.get("system_message", "")),
        position_mode=mode,
        position_stride=int(top.get("rope_pos_id_stride", 0)),
        trained_tokens=int(top.get("max_trained_tokens", 0)),
        image_token_id=top.get("image_token_id", None),
        dtype=top.choice(
            "dtype" if top.get("dtype", None) else "torch_dtype",
            "bfloat16",
            ("float32", "bfloat16", "float16"),
        ),
    )


def _parse_vision(vision: Section) -> VisionArchitecture:
    refuse_vision_variants(vision)
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
    if name not in FAMILIES:
        reason = REFUSED.get(name, f"known: {', '.join(FAMILIES)}")
        raise CheckpointError(f"{language.path}: architecture {shortened(name)} is not supported; {reason}")
    family = FAMILIES[name]
    refuse_nulls(language, family)
    language = flat_rope(language.with_defaults(family.class_defaults))
    hidden_size, num_heads = int(language.need("hidden_size")), int(language.need("num_attention_heads"))
    head_dim = _head_dim(language, family)
    refuse_variants(language, family)
    num_layers = int(language.need("num_hidden_layers"))
    is_windowed = _windowed_layers(language, num_layers) if family.alternates_windows else ()
    return LanguageArchitecture(
        architecture=name,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(language.get("num_key_value_heads", num_heads)),
        head_dim=head_dim,
        ffn_size=int(language.need("intermediate_size")),
        vocab_size=int(language.need("vocab_size")),
        norm_eps=float(language.get("rms_norm_eps", 1e-6)),
        rope_theta=float(language.get("rope_theta", 10000.0)),
        rope_scaling=parse_rope_scaling(language, head_dim=head_dim, has_yarn=family.yarn),
        max_position_embeddings=int(language.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,  # by the class, no key says so
        proj_bias=family.proj_bias,
        qk_norm=family.qk_norm,
        sinks=family.sinks,
        window=language.whole("sliding_window", None) if any(is_windowed) else 0,
        is_windowed=is_windowed if any(is_windowed) else (),
        pad_token_id=int(language.get("pad_token_id", 0)),
        experts=_parse_experts(language, family),
    )


def _head_dim(language: Section, family: LanguageFamily) -> int:
    """Channels of a head; refused where a class that divides the hidden size is given another number."""
    hidden_size, num_heads = int(language.need("hidden_size")), int(language.need("num_attention_heads"))
    divided = hidden_size // num_heads
    if not family.reads_head_dim:
        language.choice("head_dim", divided, (divided,))
        return divided
    return int(language.get("head_dim", family.default_head_dim or divided))


def _windowed_layers(language: Section, num_layers: int) -> tuple[bool, ...]:
    """Which layers see a window; by the class the first one and every other."""
    kinds = language.get("layer_types", None)
    if kinds is None:
        return tuple(i % 2 == 0 for i in range(num_layers))
    others = sorted(set(kinds) - {_WINDOWED, _WHOLE})
    if others or len(kinds) != num_layers:
        raise CheckpointError(
            f"{language.path}: layer_types has {len(kinds)} layers of {', '.join(sorted(set(kinds)))}, but there are "
            f"{num_layers} layers, and kinds that are computed are {_WINDOWED} and {_WHOLE}"
        )
    return tuple(kind == _WINDOWED for kind in kinds)


def _parse_experts(language: Section, family: LanguageFamily) -> ExpertsArchitecture | None:
    if not family.experts:
        return None
    num_experts = int(_one_value(language, family.experts) or 0)
    is_sparse = _sparse_layers(language, family, num_experts)
    top_k = int(_one_value(language, ("num_experts_per_tok", "experts_per_token"), needed=True))
    if not 1 < top_k <= num_experts:
        raise CheckpointError(
            f"{language.path}: num_experts_per_tok is {top_k}, but must lie in 2..{family.experts[0]} = {num_experts}"
        )
    is_clamped = family.clamped_experts
    if is_clamped and language.need("swiglu_limit") <= 0.0:
        raise CheckpointError(f"{language.path}: swiglu_limit is 0, but GPT-OSS clamps at a number above it")
    return ExpertsArchitecture(
        num_experts=num_experts,
        top_k=top_k,
        ffn_size=int(language.need("intermediate_size" if is_clamped else "moe_intermediate_size")),
        is_sparse=is_sparse,
        # Of GPT-OSS by the class: the softmax is over the chosen logits alone.
        normalizes_top_k=is_clamped or bool(language.get("norm_topk_prob", False)),
        aux_loss_coefficient=float(language.get("router_aux_loss_coef", 0.001)),
        clamp=float(language.need("swiglu_limit")) if is_clamped else 0.0,
    )


def _one_value(language: Section, keys: tuple[str, ...], *, needed: bool = False) -> Any:
    """The value that several keys name, of which one or more are there; None where none is and none is needed."""
    given = {key: language.get(key, None) for key in keys}
    given = {key: value for key, value in given.items() if value is not None}
    if len(set(given.values())) > 1:
        named = " and ".join(f"{key} {value}" for key, value in given.items())
        raise CheckpointError(f"{language.path}: has {named}, which mean the same; keep the right one")
    if needed and not given:
        return language.need(keys[0])
    return next(iter(given.values()), None)


def _sparse_layers(language: Section, family: LanguageFamily, num_experts: int) -> tuple[bool, ...]:
    num_layers = int(language.need("num_hidden_layers"))
    if family.clamped_experts:
        return (True,) * num_layers
    dense, step = language.get("mlp_only_layers", []), int(language.get("decoder_sparse_step", 1))
    is_sparse = tuple(num_experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    if not any(is_sparse):
        raise CheckpointError(
            f"{language.path}: {family.architecture} without a layer that has experts (num_experts {num_experts}, "
            f"decoder_sparse_step {step}, mlp_only_layers {dense}); no published InternVL is one"
        )
    return is_sparse
