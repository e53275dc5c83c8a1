"""What the planner is asked: architecture by name, file or checkpoint, and a run checked without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megatron_v2pe.config.architecture import InternVLArchitecture, parse_architecture, read_architecture
from megatron_v2pe.config.published import PUBLISHED
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import validate
from megatron_v2pe.core.errors import ConfigError

HF_FOLDER = "hf"  # of an imported checkpoint


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
        name: a published size (2B), a config.json, or a folder with one; None takes the run's own.
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
    size = name.upper().removeprefix("INTERNVL2-")
    if size in PUBLISHED:
        return f"InternVL2-{size}", parse_architecture(PUBLISHED[size], f"published {size}")
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
