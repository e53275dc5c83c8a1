"""A PEFT adapter folder, with the base it belongs to -> a checkpoint of adapters; the inverse of `peft_export`.

    adapter_config.json + names and shapes of adapter_model.safetensors --> lora section, problems
    A, B of each Hugging Face linear --rows in our order--> state keys --> checkpoint

Everything that PEFT can do and training here cannot is refused by name, never left out silently.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_v2pe.assembly.adapters import fused_parts
from megatron_v2pe.checkpoint.adapters.peft_export import CONFIG_FILE, PREFIX, refuse_pyramid
from megatron_v2pe.checkpoint.adapters.peft_names import PeftModules
from megatron_v2pe.checkpoint.adapters.weights import AdaptedLinear, adapted_linears
from megatron_v2pe.checkpoint.files.adapter_record import (
    AdapterRecord,
    checkpoint_identity,
    require_whole,
    write_record,
)
from megatron_v2pe.checkpoint.files.folder import CheckpointInfo, hf_path, read_info, state_path, write_info
from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.files.staging import staged
from megatron_v2pe.checkpoint.hf.weight_files import outside_or_odd
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.checkpoint.state.save import save_state
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.lora import PARTS, Part, linear_names
from megatron_v2pe.config.schema import LoRAConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import read_json_object

_NEEDED = {"peft_type": "LORA", "bias": "none"}
_REFUSED = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "lora_bias")


def import_peft(
    folder: str | Path, target: str | Path, *, base: str | Path, force: bool = False
) -> CheckpointInfo:
    """Make a checkpoint of a PEFT folder's adapters.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        target: folder to create.
        base: checkpoint of the whole model that the adapters were trained on.
        force: replace `target` if it exists, once the new one is complete.

    Raises:
        CheckpointError: everything that is wrong with the folder, in one message.
    """
    info = read_info(base)
    require_whole(base)
    arch = read_architecture(hf_path(base))
    refuse_pyramid(arch, base)
    modules = PeftModules.of(arch)
    config, weights = _read_config(Path(folder) / CONFIG_FILE), HFWeights(folder)
    raise_problems(f"{folder}: cannot be imported", list(weights.problems))
    linears = list(_present(arch, weights, modules))
    lora = _lora_of(folder, config, weights, linears, arch)
    record = AdapterRecord(base=str(Path(base).resolve()), base_sha256=checkpoint_identity(base), lora=lora)
    shards = dict(_shards(weights, linears, arch))
    needed_bytes = sum(weights.tensors[name].num_bytes for name in weights.tensors)
    with staged(target, force=force, needed_bytes=needed_bytes) as made:
        raise_problems(f"{base}: cannot be copied", outside_or_odd(hf_path(base)))
        shutil.copytree(hf_path(base), hf_path(made), copy_function=shutil.copyfile)
        write_record(made, record, target=Path(target))
        state_path(made).mkdir()
        save_state(state_path(made), shards)
        write_info(
            made,
            CheckpointInfo(kind="import", step=0, family=info.family, num_parameters=info.num_parameters),
        )
    return read_info(target)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json_object(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; --base is for PEFT folders") from None
    problems = [
        f"{key} is {config.get(key)!r}, must be {wanted!r}"
        for key, wanted in _NEEDED.items()
        if config.get(key) != wanted
    ]
    problems += [f"{key} is {config[key]!r}, which is not supported" for key in _REFUSED if config.get(key)]
    alphas = {"lora_alpha": config.get("lora_alpha"), **_alpha_patterns(path, config)}
    problems += [
        f"{key} is {str(alpha)[:60]!r}, must be a number above 0"
        for key, alpha in alphas.items()
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf
    ]
    raise_problems(f"{path}: cannot be imported", problems)
    return config


def _alpha_patterns(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: alpha_pattern must be an object of pattern -> alpha")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path}: alpha_pattern {pattern[:60]!r} is no pattern ({error})") from None
    return patterns


def _present(arch: InternVLArchitecture, weights: HFWeights, modules: PeftModules) -> Iterator[AdaptedLinear]:
    """Linears of the model that the folder has an A for."""
    everything = LoRAConfig(language_rank=1, vision_rank=1, projector_rank=1)
    for linear in adapted_linears(everything, arch):
        if any(name in weights.tensors for name in _names(linear, "lora_A", modules)):
            yield linear


def _names(linear: AdaptedLinear, factor: str, modules: PeftModules) -> list[str]:
    """Tensors of a linear, one for each of its modules."""
    return [f"{PREFIX}{module}.{factor}.weight" for module in modules.names(linear)]


def _lora_of(
    folder: str | Path,
    config: dict[str, Any],
    weights: HFWeights,
    linears: list[AdaptedLinear],
    arch: InternVLArchitecture,
) -> LoRAConfig:
    """The `lora` section that would have trained these adapters.

    Raises:
        CheckpointError: there is none.
    """
    modules = PeftModules.of(arch)
    problems = [*_name_problems(weights, linears, modules), *_shape_problems(weights, linears, modules)]
    if not linears:
        problems.append("no adapter of any linear of the base's model")
    raise_problems(f"{folder}: cannot be imported", problems)
    ranks: dict[Part, set[int]] = {}
    alphas: dict[Part, set[float]] = {}
    for linear in linears:
        for name, module in zip(_names(linear, "lora_A", modules), modules.names(linear), strict=True):
            ranks.setdefault(linear.part, set()).add(weights.tensors[name].shape[0])
            alphas.setdefault(linear.part, set()).add(_alpha(config, module))
    problems = [
        f"the {part} has ranks {ranks[part]} and alphas {alphas[part]}; must be one of each"
        for part in ranks
        if len(ranks[part]) > 1 or len(alphas[part]) > 1
    ]
    raise_problems(f"{folder}: cannot be imported", problems)
    rank = {f"{part}_rank": min(found) for part, found in ranks.items()}
    lora = LoRAConfig(
        **rank, alpha=_common_alpha(folder, rank, alphas), targets=_targets(linears, ranks, arch)
    )
    wanted = {linear.hf_name for linear in adapted_linears(lora, arch)}
    lacking = sorted(wanted - {linear.hf_name for linear in linears})
    raise_problems(f"{folder}: adapters are missing in some layers", lacking)
    return lora


def _name_problems(weights: HFWeights, linears: list[AdaptedLinear], modules: PeftModules) -> Iterator[str]:
    known = {
        name
        for linear in linears
        for factor in ("lora_A", "lora_B")
        for name in _names(linear, factor, modules)
    }
    yield from (f"{name}: no linear of the base's model" for name in sorted(set(weights.tensors) - known))
    yield from (f"{name}: missing" for name in sorted(known - set(weights.tensors)))


def _shape_problems(weights: HFWeights, linears: list[AdaptedLinear], modules: PeftModules) -> Iterator[str]:
    for linear in linears:
        names = zip(
            modules.names(linear),
            modules.shapes(linear),
            *(_names(linear, factor, modules) for factor in ("lora_A", "lora_B")),
            strict=True,
        )
        for module, (rows, columns), name_a, name_b in names:
            a, b = weights.tensors.get(name_a), weights.tensors.get(name_b)
            if a and (a.shape[1:] != (columns,) or (b and b.shape != (rows, a.shape[0]))):
                yield f"{module}: shapes do not fit a weight of {(rows, columns)}"


def _alpha(config: dict[str, Any], module: str) -> float:
    """Alpha of a module by PEFT's rule: the first pattern that its name ends with, else the common one."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(value)
    return float(config["lora_alpha"])


def _common_alpha(folder: str | Path, ranks: dict[str, int], alphas: dict[Part, set[float]]) -> float:
    found = {part: min(values) for part, values in alphas.items()}
    if all(alpha == 2 * ranks[f"{part}_rank"] for part, alpha in found.items()):
        return 0.0
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{folder}: alphas {found} are neither one number nor twice the ranks")
    return next(iter(found.values()))


def _targets(
    linears: list[AdaptedLinear], ranks: dict[Part, set[int]], arch: InternVLArchitecture
) -> tuple[str, ...]:
    """Names of the linears with adapters; none where all have them."""
    found = {linear.target for linear in linears}
    names = [name for part in PARTS if part in ranks for n in linear_names(part, arch).values() for name in n]
    return () if found == set(names) else tuple(name for name in names if name in found)


def _shards(
    weights: HFWeights, linears: list[AdaptedLinear], arch: InternVLArchitecture
) -> Iterator[tuple[str, ShardedTensor]]:
    modules = PeftModules.of(arch)
    for linear in linears:
        role = linear.entry.ours.split(".")[-2]
        names = linear_names(linear.part, arch)[role]
        parts, _ = fused_parts(linear.part, role, names, arch)
        a, b = _factors(weights, linear, modules)
        if len(linear.entry.hf) == 1:  # rows of a fused linear, in our order
            b = linear.entry.transform.to_ours([b])
        whole: dict[str, Tensor] = {"lora_A": a, "lora_B": b.unflatten(0, (parts[linear.index].blocks, -1))}
        for factor, tensor in whole.items():
            key = f"{linear.prefix}{factor}"
            yield key, ShardedTensor.from_rank_offsets(key, tensor.contiguous())


def _factors(weights: HFWeights, linear: AdaptedLinear, modules: PeftModules) -> tuple[Tensor, Tensor]:
    """A and B of one linear.

    Raises:
        CheckpointError: its modules have different A, which no adapter of one linear has.
    """
    first, *others = (weights.read(name) for name in _names(linear, "lora_A", modules))
    if not all(torch.equal(first, other) for other in others):
        raise CheckpointError(
            f"{weights.folder}: {', '.join(modules.names(linear))} have different A, but are one linear here with "
            "one A; merge these adapters with PEFT and import the merged model"
        )
    return first, modules.join(linear, [weights.read(name) for name in _names(linear, "lora_B", modules)])
