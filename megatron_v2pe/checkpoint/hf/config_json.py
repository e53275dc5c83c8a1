"""What an import, a save or an export changes in config.json: trained positions, the dtype of a cast; nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_v2pe.config.position_modes import POSITION_MODES, RELEASE_NAMES
from megatron_v2pe.config.trained_settings import DEFAULTS
from megatron_v2pe.core.files import write_atomic


def update_positions(config_path: Path, *, mode: str, stride: int) -> None:
    """Write the positions that were trained into a config.json, with the release's names; touch nothing else.

    A config that has the same values, or none where `default` was trained, keeps its bytes.

    Args:
        config_path: the file.
        mode: `position.mode` of the run.
        stride: `position.stride`; written for `v2pe_fixed` only.
    """
    text = config_path.read_text(encoding="utf-8")
    values = json.loads(text)
    wanted: dict[str, Any] = {"rope_pos_id_version": RELEASE_NAMES[POSITION_MODES[mode]]}
    if mode == "v2pe_fixed":
        wanted["rope_pos_id_stride"] = stride
    if wanted == {"rope_pos_id_version": "default"} and "rope_pos_id_version" not in values:
        return
    if any(values.get(key) != value for key, value in wanted.items()):
        end = "\n" if text.endswith("\n") else ""
        write_atomic(config_path, json.dumps({**values, **wanted}, indent=2, ensure_ascii=False) + end)


def update_trained(config_path: Path, wanted: Mapping[str, Any]) -> None:
    """Write how a run trained into a config.json, see `config.trained_settings`.

    A value that the file has already, or means without naming it, is not written, so that a file of which all is true
    keeps its bytes.
    """
    text = config_path.read_text(encoding="utf-8")
    values = json.loads(text)
    meant = {
        **DEFAULTS,
        "system_message": "",
        **{key: each for key, each in values.items() if each is not None},
    }
    changed = {key: value for key, value in wanted.items() if meant.get(key) != value}
    if changed:
        end = "\n" if text.endswith("\n") else ""
        write_atomic(config_path, json.dumps({**values, **changed}, indent=2, ensure_ascii=False) + end)


def update_dtype(config_path: Path, dtype: str) -> None:
    """Write the dtype of a cast into the `torch_dtype` or `dtype` that a config.json has, also those of its parts.

    A config that has the same dtype keeps its bytes, and so does any config when `dtype` is `keep`.
    """
    text = config_path.read_text(encoding="utf-8")
    values = json.loads(text)
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    keys = ("torch_dtype", "dtype")
    stale = [(section, key) for section in sections for key in keys if section.get(key, dtype) != dtype]
    if dtype == "keep" or not stale:
        return
    for section, key in stale:
        section[key] = dtype
    end = "\n" if text.endswith("\n") else ""
    write_atomic(config_path, json.dumps(values, indent=2, ensure_ascii=False) + end)
