"""What is changed in a config.json on its way: positions that were trained, the dtype of a cast; nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.core.files import write_atomic

_RELEASE_MODES = {"default": "default", "v2pe_fixed": "v2pe_fix", "v2pe_random": "v2pe_rnd"}


def update_positions(config_path: Path, run_state: RunState) -> None:
    """Write the positions that were trained into a config.json, in the release's words; touch nothing else.

    A config that says the same already, or says nothing where `default` was trained, keeps its bytes.
    """
    text = config_path.read_text(encoding="utf-8")
    values = json.loads(text)
    wanted: dict[str, Any] = {"rope_pos_id_version": _RELEASE_MODES[run_state.position_mode]}
    if run_state.position_mode == "v2pe_fixed":
        wanted["rope_pos_id_stride"] = run_state.position_stride
    if wanted == {"rope_pos_id_version": "default"} and "rope_pos_id_version" not in values:
        return
    if any(values.get(key) != value for key, value in wanted.items()):
        end = "\n" if text.endswith("\n") else ""
        write_atomic(config_path, json.dumps({**values, **wanted}, indent=2, ensure_ascii=False) + end)


def update_dtype(config_path: Path, dtype: str) -> None:
    """Write the dtype of a cast into the `torch_dtype` that a config.json has, also those of its parts.

    A config that says the same already, or a dtype of `keep`, leaves its bytes.
    """
    text = config_path.read_text(encoding="utf-8")
    values = json.loads(text)
    sections = [values, *(value for value in values.values() if isinstance(value, dict))]
    stale = [section for section in sections if section.get("torch_dtype", dtype) != dtype]
    if dtype == "keep" or not stale:
        return
    for section in stale:
        section["torch_dtype"] = dtype
    end = "\n" if text.endswith("\n") else ""
    write_atomic(config_path, json.dumps(values, indent=2, ensure_ascii=False) + end)
