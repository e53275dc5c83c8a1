"""A narrow model of the run's kind, and the run's settings around it.

What decides how a layout cuts a model stays: family, biases and norms, query heads for each KV head, the rest of the
vocabulary over 64, experts and windows and which layers have them, the tower's style, frozen parts, adapters,
recomputation. Widths and depths become small, so that float64 on processes of one machine takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from megatron_v2pe.config.arch.architecture import (
    ExpertsArchitecture,
    InternVLArchitecture,
    LanguageArchitecture,
)
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture
from megatron_v2pe.config.schema import OptimConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.verification.prove.layout import ProvenLayout

HEAD_DIM = 8
VISION_HEAD_DIM = 8
MOST_EXPERTS = 8
MOST_WINDOW = 12  # shorter than the documents of a proof


def check_provable(config: RunConfig, arch: InternVLArchitecture) -> None:
    """Refuse what one rank and many compute differently by design, or what has no narrow model.

    Raises:
        ConfigError: names it.
    """
    if arch.pyramid is not None:
        raise ConfigError(
            "the checkpoint has an image pyramid (piip_config), of which `prove` has no narrow model; "
            "`check-golden --group piip` compares pyramids"
        )
    if config.moe.capacity_factor:
        raise ConfigError(
            f"moe.capacity_factor is {config.moe.capacity_factor}, with which experts drop tokens by rank, so that "
            "layouts differ by design and nothing can be proven; set it to 0"
        )


def narrow_architecture(
    arch: InternVLArchitecture, layout: ProvenLayout, *, tile_side: int
) -> InternVLArchitecture:
    """The narrow model.

    Args:
        arch: of the run's checkpoint.
        layout: what runs; heads, channels and layers divide by it.
        tile_side: patches on a tile's side, a multiple of 1 / downsample_ratio.
    """
    patch = arch.vision.patch_size
    image_size = tile_side * patch
    resizes = arch.vision.image_size != arch.image_size
    language = _language(arch.language, layout)
    return dataclasses.replace(
        arch,
        language=language,
        vision=_vision(arch.vision, layout, image_size=image_size + (2 * patch if resizes else 0)),
        image_size=image_size,
        position_stride=min(1, arch.position_stride),
        dtype="float32",
    )


def _language(language: LanguageArchitecture, layout: ProvenLayout) -> LanguageArchitecture:
    parallel = layout.parallel
    unit = parallel.tp * (parallel.cp if parallel.cp_comm_type == "a2a" else 1)
    kv_heads = language.num_kv_heads if language.num_kv_heads < unit else _multiple(2, unit)
    kv_heads = min(kv_heads, language.num_kv_heads)
    heads = kv_heads * (language.num_heads // language.num_kv_heads)
    is_square = language.num_heads * language.head_dim == language.hidden_size
    # Frequencies of their own (longrope) are as many as the true head has.
    head_dim = language.head_dim if language.rope_scaling.short_factors else HEAD_DIM
    hidden = heads * head_dim if is_square else _multiple(heads * head_dim // 2, 8 * parallel.tp)
    return dataclasses.replace(
        language,
        hidden_size=hidden,
        num_layers=layout.num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=_multiple(48, 4 * parallel.tp),
        vocab_size=512 + language.vocab_size % 64,
        # Positions beyond the trained length, where frequencies are scaled by length.
        rope_scaling=dataclasses.replace(
            language.rope_scaling, trained_positions=min(64, language.rope_scaling.trained_positions)
        ),
        window=min(language.window, MOST_WINDOW),
        is_windowed=_of_places(language.is_windowed, layout.num_layers) if language.window else (),
        experts=_experts(language.experts, layout),
    )


def _of_places(layers: Sequence[bool], num_layers: int) -> tuple[bool, ...]:
    """What a few layers are, spread over all of them; both kinds where there are both, and two layers."""
    last = len(layers) - 1
    places = [round(i * last / max(1, num_layers - 1)) for i in range(num_layers)]
    found = [layers[place] for place in places]
    if num_layers > 1 and len(set(layers)) > len(set(found)):
        found[-1] = not found[0]
    return tuple(found)


def _experts(experts: ExpertsArchitecture | None, layout: ProvenLayout) -> ExpertsArchitecture | None:
    if experts is None:
        return None
    parallel = layout.parallel
    count = _multiple(min(experts.num_experts, MOST_EXPERTS), parallel.ep)
    sparse = _of_places(experts.is_sparse, layout.num_layers)
    return dataclasses.replace(
        experts,
        num_experts=count,
        top_k=min(experts.top_k, max(1, count // 2)),
        ffn_size=_multiple(24, 4 * parallel.expert_tp),
        is_sparse=sparse if any(sparse) else (*sparse[:-1], True),
    )


def _vision(vision: VisionArchitecture, layout: ProvenLayout, *, image_size: int) -> VisionArchitecture:
    heads = 3 if vision.num_heads % 2 else 2  # 25 heads of InternViT-6B divide by no tp; they are padded
    return dataclasses.replace(
        vision,
        hidden_size=heads * VISION_HEAD_DIM,
        num_layers=2,
        num_heads=heads,
        ffn_size=_multiple(24, 4 * layout.parallel.tp),
        image_size=image_size,
    )


def _multiple(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def narrow_config(config: RunConfig, layout: ProvenLayout, *, num_packs: int) -> tuple[RunConfig, list[str]]:
    """The run's settings with the proven layout, and what was changed because it is random or needs a GPU.

    The optimizer is that of the parity matrix: eps above most gradients, or the rounding of a gradient near zero would
    become a whole step (docs/numerics.md), and clipping, so that the norm reaches every weight.
    """
    notes = []
    model, vision, lora = config.model, config.vision, config.lora
    if model.fp8 != "none":
        model = dataclasses.replace(model, fp8="none", fp8_skip_layers=0)
        notes.append("model.fp8 none: rounding to 8 bits would hide errors")
    if model.offload_activations:
        model = dataclasses.replace(model, offload_activations=False)
        notes.append("model.offload_activations false: there is no GPU to move from")
    if vision.drop_path_rate:
        vision = dataclasses.replace(vision, drop_path_rate=0.0)
        notes.append("vision.drop_path_rate 0: draws differ between layouts")
    if lora.dropout:
        lora = dataclasses.replace(lora, dropout=0.0)
        notes.append("lora.dropout 0: draws differ between layouts")
    if vision.micro_batch_tiles:
        vision = dataclasses.replace(
            vision, micro_batch_tiles=2, tile_multiple=math.gcd(2, vision.tile_multiple)
        )
    if config.runtime.dtype != "float32":
        notes.append(f"float32 and float64 for the run's {config.runtime.dtype}")
    if config.parallel.attention_backend == "transformer_engine":
        notes.append(
            "native attention for Transformer Engine's, whose kernels need a GPU: `preflight` compares those"
        )
    narrow = dataclasses.replace(
        config,
        model=dataclasses.replace(model, loss_chunk_tokens=min(64, model.loss_chunk_tokens)),
        vision=vision,
        lora=lora,
        parallel=layout.parallel,
        optim=OptimConfig(
            lr=1e-1, min_lr=1e-1, eps=1e-2, clip_grad=0.5, steps=10, global_batch_size=num_packs
        ),
        runtime=RuntimeConfig(
            run_dir=config.runtime.run_dir, seed=config.runtime.seed, dtype="float32", elementwise="eager"
        ),
    )
    return narrow, notes
