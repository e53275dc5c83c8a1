"""What a checkpoint of adapters records about its base, and the search for that base.

    adapter.json    base: path, SHA-256 of its checkpoint.json; ranks, alpha, targets; parts that were trained whole

A base's `checkpoint.json` has a hash of each of its files, so its own hash identifies all of the base's bytes. The base
is searched at its recorded path, and at the same path relative to the checkpoint, so that both may be moved together.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.folder import INFO_FILE, read_info
from megatron_v2pe.config.lora import is_adapter_parameter, parts_trained_whole
from megatron_v2pe.config.schema import LoRAConfig, RunConfig
from megatron_v2pe.config.sections.parts import is_in
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.plain_files import read_json_object

RECORD_FILE = "adapter.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """Contents of `adapter.json`.

    Attributes:
        base: absolute path of the base checkpoint when the adapters were trained.
        base_sha256: of its `checkpoint.json`.
        lora: what was trained.
        trained_parts: parts of the model that were trained whole, and are stored whole.
    """

    base: str
    base_sha256: str
    lora: LoRAConfig
    trained_parts: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether a parameter, or a state key, is stored with the adapters and not taken from the base."""
        return is_adapter_parameter(name) or is_in(name, self.trained_parts)


def describe_adapters(config: RunConfig) -> AdapterRecord | None:
    """What a run's checkpoints will record about their base; None for a run without adapters.

    Raises:
        CheckpointError: the base is no checkpoint, or has adapters itself.
    """
    if not config.lora.is_on:
        return None
    return AdapterRecord(
        base=str(Path(config.model.checkpoint).resolve()),
        base_sha256=checkpoint_identity(config.model.checkpoint),
        lora=config.lora,
        trained_parts=parts_trained_whole(config),
    )


def checkpoint_identity(checkpoint: str | Path) -> str:
    """SHA-256 of a checkpoint's `checkpoint.json`."""
    return hashlib.sha256((Path(checkpoint) / INFO_FILE).read_bytes()).hexdigest()


def require_whole(checkpoint: str | Path) -> None:
    """Refuse a checkpoint of adapters where weights of a whole model are needed.

    Raises:
        CheckpointError: with the way to make it whole.
    """
    if read_record(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint}: holds adapters, not a whole model; `megatron-v2pe export-hf` merges them and import-hf "
            "imports the result, or start from the base that is named in adapter.json"
        )


def require_same_adapters(now: AdapterRecord | None, checkpoint: str | Path) -> None:
    """Refuse to resume a run whose adapters or base differ from those of its checkpoint.

    Raises:
        ConfigError: names what differs.
    """
    saved = read_record(checkpoint)
    if saved is None and now is None:
        return
    way_out = "restore the setting, or give the run a new runtime.run_dir"
    if saved is None or now is None:
        has = "has no adapters" if saved is None else "has adapters"
        raise ConfigError(f"{checkpoint}: {has}, but lora.* of this run configures the opposite; {way_out}")
    if saved.base_sha256 != now.base_sha256:
        raise ConfigError(f"{checkpoint}: its base was {saved.base}, not model.checkpoint; {way_out}")
    for key in ("language_rank", "vision_rank", "projector_rank", "alpha", "targets"):
        before, after = getattr(saved.lora, key), getattr(now.lora, key)
        if before != after:
            raise ConfigError(
                f"lora.{key} is {after!r}, but {checkpoint} was trained with {before!r}; {way_out}"
            )
    if saved.trained_parts != now.trained_parts:
        before, after = (", ".join(parts) or "none" for parts in (saved.trained_parts, now.trained_parts))
        raise ConfigError(
            f"parts trained whole are {after}, but {checkpoint} has {before}; restore model.freeze_language, "
            "model.freeze_projector, vision.freeze and vision.freeze_large_branch, or give the run a new "
            "runtime.run_dir"
        )


def write_record(folder: Path, record: AdapterRecord, *, target: Path) -> None:
    """Write `adapter.json` into a checkpoint that will be named `target`."""
    values = asdict(record)
    values["base_relative"] = os.path.relpath(record.base, target.resolve())
    text = json.dumps({"format_version": _FORMAT_VERSION, **values}, indent=2)
    write_atomic(folder / RECORD_FILE, text + "\n")


def read_record(checkpoint: str | Path) -> AdapterRecord | None:
    """The record of a checkpoint of adapters; None for one of a whole model.

    Raises:
        CheckpointError: the file is damaged.
    """
    values = _read_json(Path(checkpoint) / RECORD_FILE)
    if values is None:
        return None
    try:
        lora = values["lora"]
        for key in ("base", "base_sha256", "base_relative"):
            if not isinstance(values.get(key, ""), str) or "\0" in values.get(key, ""):
                raise TypeError(f"{key} is no text")
        return AdapterRecord(
            base=values["base"],
            base_sha256=values["base_sha256"],
            lora=LoRAConfig(**{**lora, "targets": tuple(lora["targets"])}),
            trained_parts=tuple(values["trained_parts"]),
        )
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{Path(checkpoint) / RECORD_FILE}: damaged ({type(error).__name__}: {error})"
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = read_json_object(path)
    except FileNotFoundError:
        return None
    if values.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(f"{path}: must be a json object of format_version {_FORMAT_VERSION}")
    return values


def checkpoint_lora(checkpoint: str | Path) -> LoRAConfig:
    """The `lora` section of a checkpoint of adapters; without adapters for one of a whole model.

    Raises:
        CheckpointError: it has adapters, but their base is gone or changed.
    """
    record = read_record(checkpoint)
    if record is None:
        return LoRAConfig()
    find_base(checkpoint)
    return record.lora


def find_base(checkpoint: str | Path) -> Path:
    """The base of a checkpoint of adapters.

    Raises:
        CheckpointError: it is gone, or is not what the adapters were trained on.
    """
    path = Path(checkpoint) / RECORD_FILE
    values, record = _read_json(path), read_record(checkpoint)
    if values is None or record is None:
        raise CheckpointError(f"{path}: missing; this is not a checkpoint of adapters")
    places = [Path(record.base), Path(checkpoint).resolve() / str(values.get("base_relative", ""))]
    found = [place for place in places if (place / INFO_FILE).is_file()]
    for place in found:
        if checkpoint_identity(place) == record.base_sha256:
            read_info(place)
            return place
    if not found:
        raise CheckpointError(
            f"{checkpoint}: holds adapters of {record.base}, which does not exist; put the base back, or a symbolic "
            "link to its new place"
        )
    raise CheckpointError(
        f"{checkpoint}: holds adapters of {record.base}, but another checkpoint is there now (its "
        f"{INFO_FILE} has SHA-256 {checkpoint_identity(found[0])[:12]}..., not {record.base_sha256[:12]}...); restore "
        "the base"
    )
