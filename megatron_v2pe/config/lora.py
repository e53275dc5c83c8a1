"""Which linears of a model can carry an adapter, under the names that Hugging Face models and PEFT use.

    part       role in a layer     linears of the Hugging Face model that lie in it, in the order of its rows
    language   linear_qkv          wqkv  |  q_proj, k_proj, v_proj  |  qkv_proj
    ...

A role is one linear of ours, where queries, keys and values, or gate and up, are fused. The release asks for Llama's
names whatever the language model is; those do not exist in InternLM2, whose own are used here.
"""

from __future__ import annotations

import re

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.families import FAMILIES
from megatron_v2pe.config.schema import LoRAConfig, RunConfig
from megatron_v2pe.config.sections.parts import PARTS, PYRAMID, Part
from megatron_v2pe.core.errors import ConfigError

LinearNames = dict[str, tuple[str, ...]]
ADAPTERS = "lora"  # attribute of a linear that holds its adapters; part of their parameters' names

_ROLES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_IN_A_LAYER = re.compile(r"language\.decoder\.layers\.\{i\}\.(self_attention|mlp)\.(\w+)\.weight")
VISION: LinearNames = {
    "linear_qkv": ("attn.qkv",),
    "linear_proj": ("attn.proj",),
    "linear_fc1": ("mlp.fc1",),
    "linear_fc2": ("mlp.fc2",),
}
PROJECTOR: LinearNames = {"linear_fc1": ("mlp1.1",), "linear_fc2": ("mlp1.3",)}


def linear_names(part: Part, arch: InternVLArchitecture) -> LinearNames:
    """Linears of a part: our role -> Hugging Face names, in the order of the role's rows."""
    if part == "language":
        return _language_names(arch)
    return VISION if part == "vision" else PROJECTOR


def _language_names(arch: InternVLArchitecture) -> LinearNames:
    """From the family's names table; where layers have experts, attention alone can carry adapters."""
    names: LinearNames = {}
    for rule in FAMILIES[arch.language.architecture].github:
        found = _IN_A_LAYER.fullmatch(rule.ours)
        if found and (found[1] == "self_attention" or arch.language.experts is None):
            names[found[2]] = tuple(name.split(".")[-2] for name in rule.hf)
    return {role: names[role] for role in _ROLES if role in names}


def adapted_names(lora: LoRAConfig, part: Part, arch: InternVLArchitecture) -> tuple[str, ...]:
    """Linears of a part that get an adapter."""
    if not lora.rank_of(part):
        return ()
    names = [name for names in linear_names(part, arch).values() for name in names]
    return tuple(name for name in names if not lora.targets or name in lora.targets)


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter, or its key in a checkpoint, belongs to an adapter."""
    return f".{ADAPTERS}." in name


def parts_trained_whole(config: RunConfig) -> tuple[str, ...]:
    """Parts whose own weights are trained: not frozen, and without adapters.

    Of a tower with a pyramid the large branch may be frozen, or have adapters; what is around it is then a part too.
    """
    parts = [part for part in PARTS if not config.is_frozen(part) and not config.lora.rank_of(part)]
    has_pyramid = config.vision.tower == "piip" and not config.vision.freeze
    return (*parts, PYRAMID) if has_pyramid and "vision" not in parts else tuple(parts)


def check_lora(config: RunConfig, arch: InternVLArchitecture) -> None:
    """Every target exists in a part with adapters, and every such part has a target.

    Raises:
        ConfigError: with the names that there are.
    """
    lora = config.lora
    if lora.is_on and config.model.hf_path:
        raise ConfigError(
            f"model.hf_path is {config.model.hf_path!r}, but checkpoints of adapters (lora.*) name their base by "
            "hashes that only a checkpoint has; import it (megatron-v2pe import-hf) and set model.checkpoint"
        )
    known = {
        part: [name for names in linear_names(part, arch).values() for name in names]
        for part in PARTS
        if lora.rank_of(part)
    }
    for target in lora.targets:
        if not any(target in names for names in known.values()):
            listed = "; ".join(f"{part} has {', '.join(names)}" for part, names in known.items())
            raise ConfigError(
                f"lora.targets names {target!r}, but no part with adapters has such a linear: {listed}"
            )
    if lora.language_rank and config.parallel.tp > arch.language.num_kv_heads:
        raise ConfigError(
            f"lora.language_rank is {lora.language_rank} and parallel.tp is {config.parallel.tp}, but with more ranks "
            f"than the {arch.language.num_kv_heads} KV heads a rank has a part of a head's rows, to which no adapter "
            "fits; make parallel.tp smaller"
        )
    for part, names in known.items():
        if not adapted_names(lora, part, arch):
            raise ConfigError(
                f"lora.{part}_rank is {lora.rank_of(part)}, but none of lora.targets is in the {part}; add one of "
                f"{', '.join(names)}, or set lora.{part}_rank to 0"
            )
