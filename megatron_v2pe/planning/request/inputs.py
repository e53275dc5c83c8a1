"""What the planner is asked: the request, its model by name, file or checkpoint, its GPU; checked without a cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture, read_architecture
from megatron_v2pe.config.arch.published import PUBLISHED, published_key
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import validate
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.memory import KVKind
from megatron_v2pe.inference.chunks import DEFAULT_CHUNK_TOKENS
from megatron_v2pe.planning.request.hardware import GPUS, Hardware, with_rates
from megatron_v2pe.planning.request.workload import Assumptions

HF_FOLDER = "hf"  # of an imported checkpoint


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked.

    Attributes:
        config: the run.
        gpus: ranks.
        arch: size, config.json or folder; None means the run's model.
        gpu: key of `hardware.GPUS`.
        gpu_memory: device memory in GB as the vendor writes it; 0 means the GPU's own.
        rates: replaced fields of the hardware, `name=value`.
        assumptions: what a pack is made of.
        measure_data: read it from data.meta instead.
        inference: prompt tokens; 0 plans training.
        chunk_tokens: tokens of a prefill chunk.
        kv: how keys and values of the prompt are stored.
        search: number of layouts to list; 0 plans the run's own.
        as_json: json instead of text.
    """

    config: RunConfig
    gpus: int
    arch: str | None = None
    gpu: str = "h100"
    gpu_memory: float = 0.0
    rates: tuple[str, ...] = ()
    assumptions: Assumptions = field(default_factory=Assumptions)
    measure_data: bool = False
    inference: int = 0
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    kv: KVKind = "model"
    search: int = 0
    as_json: bool = False


def hf_folder(config: RunConfig) -> Path:
    """Folder with `config.json` and tokenizer of the run's model.

    Raises:
        ConfigError: the run names no model.
    """
    if config.model.hf_path:
        return Path(config.model.hf_path)
    if not config.model.checkpoint:
        raise ConfigError(
            "model.checkpoint is empty, so the model is not known; give --arch SIZE "
            f"({', '.join(PUBLISHED)}) or --arch CONFIG_JSON, or set model.checkpoint=PATH"
        )
    return Path(config.model.checkpoint) / HF_FOLDER


def find_architecture(name: str | None, config: RunConfig) -> tuple[str, InternVLArchitecture]:
    """The model and what to call it.

    Args:
        name: a published size (2B), a config.json, or a folder with one; None means the run's own.
        config: the run.

    Raises:
        ConfigError: nothing of that name.
        CheckpointError: a config.json that is not one of InternVL2.
    """
    if name is None:
        folder = hf_folder(config)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model: {folder}/config.json does not exist (yet); to plan before the checkpoint is there give --arch "
                f"SIZE ({', '.join(PUBLISHED)}) or --arch CONFIG_JSON"
            )
        return str(folder), read_architecture(folder)
    size = published_key(name)
    if size in PUBLISHED:
        series = "InternVL" if size[1] in ".-" else "InternVL2-"
        return f"{series}{size}", parse_architecture(PUBLISHED[size], f"published {size}")
    path = Path(name)
    if path.is_dir():
        return name, read_architecture(path)
    if path.is_file():
        return name, parse_architecture(_read_json(path), name)
    raise ConfigError(
        f"--arch {name}: neither a published size ({', '.join(PUBLISHED)}) nor a config.json nor a folder with one"
    )


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--arch {path}: not valid json ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--arch {path}: must hold a json object")
    return values


def check_run(config: RunConfig, arch: InternVLArchitecture, gpus: int) -> None:
    """Every rule of a run but those on paths: a plan needs no checkpoint, no data and no run folder.

    Raises:
        ConfigError: see `config.validate`.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}, but must be at least 1")
    model = config.model
    if not (model.checkpoint or model.hf_path):
        model = replace(model, checkpoint="-")
    named = replace(
        config,
        model=model,
        data=replace(config.data, meta=config.data.meta or "-"),
        runtime=replace(config.runtime, run_dir=config.runtime.run_dir or "-"),
    )
    validate(named, arch, gpus)


def chosen_hardware(request: PlanRequest) -> Hardware:
    """The GPU with the request's memory and rates. An "80 GB" GPU shows a little less in GiB than 80.

    Raises:
        ConfigError: unknown rate, or a memory that is not positive.
    """
    hardware = GPUS[request.gpu]
    if request.gpu_memory < 0:
        raise ConfigError(f"--gpu-memory is {request.gpu_memory}, but must be positive (GB)")
    if request.gpu_memory:
        nominal = float(hardware.name.split()[-2])
        share = hardware.memory_gib / nominal
        name = hardware.name.replace(f"{nominal:g} GB", f"{request.gpu_memory:g} GB")
        hardware = replace(hardware, name=name, memory_gib=request.gpu_memory * share)
    return with_rates(hardware, request.rates)
