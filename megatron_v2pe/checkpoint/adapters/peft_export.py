"""A checkpoint of adapters -> a PEFT adapter folder.

    adapter_config.json          ranks, alphas, target modules, parts that are stored whole (modules_to_save)
    adapter_model.safetensors    base_model.model.<module of the Hugging Face model>.lora_A.weight, .lora_B.weight

PEFT adds alpha / r * B A to a linear, as training here does, and every adapter here belongs to one linear of the
Hugging Face model; so the folder loads onto the base with `PeftModel.from_pretrained` and computes the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_v2pe.checkpoint.adapters.merge import hf_factors
from megatron_v2pe.checkpoint.adapters.peft_names import PeftModules
from megatron_v2pe.checkpoint.adapters.weights import AdaptedLinear, adapted_linears
from megatron_v2pe.checkpoint.files.adapter_record import AdapterRecord, read_record
from megatron_v2pe.checkpoint.files.folder import hf_path, read_info, state_path
from megatron_v2pe.checkpoint.files.staging import staged
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo, WeightFile, write_weight_file
from megatron_v2pe.checkpoint.hf.name_map import Entry
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.lora import PARTS
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def export_peft(checkpoint: str | Path, target: str | Path, *, force: bool = False) -> int:
    """Write the adapters of a checkpoint as a PEFT folder.

    Args:
        checkpoint: a checkpoint of adapters.
        target: folder to create.
        force: replace `target` if it exists, once the new one is complete.

    Returns:
        Number of tensors.

    Raises:
        CheckpointError: the checkpoint has no adapters, is damaged, or the target cannot be written.
    """
    read_info(checkpoint)
    record = read_record(checkpoint)
    if record is None:
        raise CheckpointError(
            f"{checkpoint}: holds a whole model and no adapters; export it without --adapter"
        )
    arch = read_architecture(hf_path(checkpoint))
    refuse_pyramid(arch, checkpoint)
    modules = PeftModules.of(arch)
    linears = list(adapted_linears(record.lora, arch))
    stored = StateReader(state_path(checkpoint))
    infos, readers = _tensors(linears, modules, record, stored)
    file = WeightFile(WEIGHTS_FILE, infos, {"format": "pt"})
    with staged(target, force=force, needed_bytes=file.num_bytes) as folder:
        write_weight_file(folder, file=file, read=lambda name: readers[name]())
        is_tied = arch.language.tie_word_embeddings
        config = peft_config(record, linears, modules, hf_path(checkpoint), is_tied=is_tied)
        text = json.dumps(config, indent=2)
        write_atomic(folder / CONFIG_FILE, text + "\n")
    return len(infos)


def refuse_pyramid(arch: InternVLArchitecture, checkpoint: str | Path) -> None:
    """Adapters are exchanged under the names of a released model's modules."""
    if arch.pyramid is not None:
        raise CheckpointError(
            f"{checkpoint}: has a pyramid around its vision tower (PIIP), which no model that PEFT can load has; merge "
            "the adapters (export-hf without --adapter)"
        )


def _tensors(
    linears: list[AdaptedLinear], modules: PeftModules, record: AdapterRecord, stored: StateReader
) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], Tensor]]]:
    """Contents of the weights file, in order: name -> dtype and shape, name -> function that reads it."""
    infos: dict[str, TensorInfo] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    for linear in linears:
        rank = record.lora.rank_of(linear.part)
        for number, (module, whole) in enumerate(
            zip(modules.names(linear), modules.shapes(linear), strict=True)
        ):
            rows, columns = whole
            for index, (factor, shape) in enumerate((("lora_A", (rank, columns)), ("lora_B", (rows, rank)))):
                name = f"{PREFIX}{module}.{factor}.weight"
                infos[name] = TensorInfo(stored.tensors[linear.prefix + factor].dtype, shape)
                readers[name] = partial(_factor, linear, modules, stored, index, number)
    for entry in modules.table.by_ours.values():
        if entry.ours.partition(".")[0] in record.trained_parts:
            for index, hf_name in enumerate(entry.hf):
                name = PREFIX + hf_name
                infos[name] = TensorInfo(stored.tensors[entry.ours].dtype, entry.hf_shapes[index])
                readers[name] = partial(_whole_tensor, entry, stored, index)
    return infos, readers


def _factor(
    linear: AdaptedLinear, modules: PeftModules, stored: StateReader, index: int, number: int
) -> Tensor:
    """A (index 0) or B (1) of one module of a linear."""
    a, b = hf_factors(linear, stored.read)
    return (modules.split(linear, b)[number] if index else a).contiguous()


def _whole_tensor(entry: Entry, stored: StateReader, index: int) -> Tensor:
    return entry.to_hf(stored.read(entry.ours))[index]


def peft_config(
    record: AdapterRecord,
    linears: list[AdaptedLinear],
    modules: PeftModules,
    hf_folder: Path,
    *,
    is_tied: bool,
) -> dict[str, Any]:
    """Contents of `adapter_config.json`.

    Parts may differ in rank: the first one's is PEFT's `r`, the others' linears are listed in `rank_pattern`.
    """
    lora = record.lora
    parts = [part for part in PARTS if lora.rank_of(part)]
    main = parts[0]
    targets = {target: linear.part for linear in linears for target in modules.targets(linear)}
    whole = [name for part in record.trained_parts for name in modules.saved_whole(part, is_tied=is_tied)]
    other = {name: part for name, part in targets.items() if lora.rank_of(part) != lora.rank_of(main)}
    hf_config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": hf_config.get("_name_or_path") or None,
        "inference_mode": True,
        "r": lora.rank_of(main),
        "lora_alpha": _number(lora.alpha_of(main)),
        "lora_dropout": lora.dropout,
        "target_modules": list(targets),
        "rank_pattern": {name: lora.rank_of(part) for name, part in other.items()},
        "alpha_pattern": {name: _number(lora.alpha_of(part)) for name, part in other.items()},
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
