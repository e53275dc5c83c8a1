"""Hugging Face InternVL folder + recipe -> the same folder with a pyramid (PIIP) around its vision tower.

    recipe.yaml   piip_config, for every branch where its weights come from, and what gates start at
    folder        weight files as they were, piip.safetensors, an index of all, config.json with piip_config

Branches come from an InternViT folder, from a timm vision transformer (DeiT, DeiT III, AugReg, MAE), or are random;
interactions start as the PIIP release starts them, with gates zero if the recipe does not say otherwise. With the
readout `large` and gates of zero the model computes
what it computed before. The readout `llava` takes the place of InternVL's projector: `mlp1` is left out of the weight
files, and the new projector is random, as LLaVA's first stage has it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from megatron_v2pe.checkpoint.convert.branch_weights import branch_tensors
from megatron_v2pe.checkpoint.convert.hf_source import copy_side_files, open_hf
from megatron_v2pe.checkpoint.files.staging import staged
from megatron_v2pe.checkpoint.files.tensor_files import WeightFile
from megatron_v2pe.checkpoint.hf.name_map import pyramid_entries, readout_entries
from megatron_v2pe.checkpoint.hf.pyramid_table import PREFIX, READOUT
from megatron_v2pe.checkpoint.hf.weight_files import INDEX_FILE, side_files
from megatron_v2pe.checkpoint.hf.weights import HFWeights
from megatron_v2pe.config.arch.architecture import (
    InternVLArchitecture,
    parse_architecture,
    require_consistent,
)
from megatron_v2pe.config.arch.pyramid import PyramidArchitecture
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.models.piip.interaction import Interaction, InteractionSettings
from megatron_v2pe.models.piip.readout import PyramidProjector

PYRAMID_FILE = "piip.safetensors"
MODEL_CLASS = "InternVLChatPIIPModel"
RANDOM = "random"
PROJECTOR = "mlp1."


def add_pyramid(
    hf_folder: str | Path, recipe: str | Path, target: str | Path, *, force: bool = False, seed: int = 0
) -> InternVLArchitecture:
    """Write a folder with a pyramid. Everything is checked before anything is written.

    Args:
        hf_folder: an InternVL folder of model_type internvl_chat.
        recipe: YAML file; see docs/piip.md.
        target: folder to create.
        force: replace `target` if it exists, once the new one is complete.
        seed: of random weights.

    Returns:
        The architecture of the new folder.

    Raises:
        ConfigError: the recipe cannot be read.
        CheckpointError: a rule of the pyramid is broken, or a folder cannot be used.
    """
    weights, plain, _ = open_hf(hf_folder)
    if plain.pyramid is not None or plain.folder_format != "github":
        what = "has a pyramid already" if plain.pyramid else "is a native folder (model_type internvl)"
        raise CheckpointError(f"{hf_folder}: {what}; give a plain folder of model_type internvl_chat")
    start, piip_config = read_recipe(recipe)
    config = json.loads((Path(hf_folder) / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != "auto_map"}
    config |= {"architectures": [MODEL_CLASS], "piip_config": piip_config}
    arch = parse_architecture(config, str(recipe))
    require_consistent(arch, str(recipe))
    generator = torch.Generator().manual_seed(seed)
    tensors = _pyramid_tensors(arch, start, generator=generator, seed=seed)
    dtype = next(iter(weights.tensors.values())).dtype
    _check_shapes(arch, tensors)
    files = [_kept(file, arch) for file in weights.files]
    size = sum((weights.folder / file.name).stat().st_size for file in weights.files)
    needed = size + sum(tensor.numel() * 4 for tensor in tensors.values())
    with staged(target, force=force, needed_bytes=needed) as folder:
        copy_side_files(weights.folder, folder, side_files(weights.folder))
        for old, file in zip(weights.files, files, strict=True):
            if file.tensors == old.tensors:
                shutil.copyfile(weights.folder / file.name, folder / file.name)
            elif file.tensors:
                _write_kept(folder / file.name, file, weights)
        cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(cast, folder / PYRAMID_FILE, metadata={"format": "pt"})
        _write_index(folder, files, cast)
        write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return arch


def _kept(file: WeightFile, arch: InternVLArchitecture) -> WeightFile:
    """A weight file without InternVL's projector, where the readout takes its place."""
    if not arch.reads_all_branches:
        return file
    tensors = {name: info for name, info in file.tensors.items() if not name.startswith(PROJECTOR)}
    return replace(file, tensors=tensors)


def _write_kept(path: Path, file: WeightFile, weights: HFWeights) -> None:
    """Write some tensors of a folder to a file, one after the other, with their bytes and order as they were."""
    with path.open("wb") as stream:
        stream.write(file.header())
        for name in file.tensors:
            stream.write(weights.read(name).contiguous().flatten().view(torch.uint8).numpy().data)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where new weights come from.

    Attributes:
        sources: of every branch: a folder, a file, or `random`.
        gate: number that every gate starts at.
    """

    sources: tuple[str, ...]
    gate: float


def read_recipe(path: str | Path) -> tuple[Start, dict[str, Any]]:
    """Where new weights come from, and the `piip_config`.

    Raises:
        ConfigError: no such file, not YAML, a branch without `weights`, or a `gate_init` that is no number.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give a recipe as docs/piip.md shows"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    rows = values.get("branches") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"{path}: branches must be a list of at least one branch with keys; docs/piip.md shows one"
        )
    sources = []
    for index, row in enumerate(rows):
        source = row.get("weights")
        if not isinstance(source, str) or not source:
            raise ConfigError(
                f"{path}: branches[{index}].weights is {shortened(source)}, but must be a folder, a file, or {RANDOM}"
            )
        sources.append(source)
    gate = values.get("gate_init", 0.0)
    if type(gate) not in (int, float) or not abs(gate) <= 1:
        raise ConfigError(
            f"{path}: gate_init is {shortened(gate)}, but must be a number in -1..1; 0 keeps what the towers compute"
        )
    plain = [{key: value for key, value in row.items() if key != "weights"} for row in rows]
    kept = {key: value for key, value in values.items() if key != "gate_init"}
    return Start(sources=tuple(sources), gate=float(gate)), {**kept, "branches": plain}


def _pyramid_tensors(
    arch: InternVLArchitecture, start: Start, *, generator: torch.Generator, seed: int
) -> dict[str, Tensor]:
    """All new tensors by their Hugging Face names, float32."""
    pyramid = arch.pyramid
    assert pyramid is not None
    tensors: dict[str, Tensor] = {}
    for index, (branch, source) in enumerate(zip(pyramid.branches, start.sources, strict=True)):
        own = branch_tensors(branch, None if source == RANDOM else Path(source), generator=generator)
        tensors |= {f"{PREFIX}branches.{index}.{name}": tensor for name, tensor in own.items()}
    settings = InteractionSettings(
        heads=pyramid.heads,
        points=pyramid.points,
        value_ratio=pyramid.value_ratio,
        ffn_ratio=pyramid.ffn_ratio,
        attention=pyramid.attention,
        norm=pyramid.norm,
        projection=pyramid.projection,
    )
    widths = (arch.vision.hidden_size, *(branch.hidden_size for branch in pyramid.branches))
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global generator
        torch.manual_seed(seed)
        for index in range(pyramid.num_interactions):
            interaction = Interaction(widths, settings, into_smaller=pyramid.both_ways(index))
            interaction.reset_parameters()
            own = {
                name: torch.full_like(tensor, start.gate) if name.endswith("_gamma") else tensor
                for name, tensor in interaction.state_dict().items()
            }
            tensors |= {f"{PREFIX}interactions.{index}.{name}": tensor for name, tensor in own.items()}
        if pyramid.reads_all:
            tensors |= _readout_tensors(pyramid, widths, arch.language.hidden_size)
    return tensors


def _readout_tensors(pyramid: PyramidArchitecture, widths: tuple[int, ...], hidden: int) -> dict[str, Tensor]:
    """LLaVA's projector: torch's initial weights, biases of zero."""
    projector = PyramidProjector(widths, hidden, norm=pyramid.readout_norm)
    own = projector.state_dict()
    return {
        f"{READOUT}{name}": torch.zeros_like(x) if name.endswith(".bias") else x for name, x in own.items()
    }


def _check_shapes(arch: InternVLArchitecture, tensors: Mapping[str, Tensor]) -> None:
    """The new tensors are exactly those that the table of import asks for."""
    wanted = {
        name: shape
        for entry in (*pyramid_entries(arch), *readout_entries(arch))
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        different = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise RuntimeError(f"pyramid tensors differ from the table of import: {different[:5]}")


def _write_index(folder: Path, files: Sequence[WeightFile], new: Mapping[str, Tensor]) -> None:
    weight_map = {name: file.name for file in files for name in file.tensors}
    weight_map |= dict.fromkeys(new, PYRAMID_FILE)
    total = sum(file.num_bytes for file in files)
    total += sum(tensor.numel() * tensor.itemsize for tensor in new.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
