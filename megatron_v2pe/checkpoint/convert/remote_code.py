"""An exported folder that transformers loads by itself, positions included.

    config.json + auto_map, positions, chat format      configuration_internvl_v2pe.py, modeling_internvl_v2pe.py

Weights keep their bytes. Nothing of this is done unless it is asked for: the default export equals what was imported.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint import remote_code
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.native import FolderFormat
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.data.text.templates import get_template

FILES = ("configuration_internvl_v2pe.py", "modeling_internvl_v2pe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_v2pe.InternVLV2PEConfig",
    "AutoModel": "modeling_internvl_v2pe.InternVLV2PEModel",
    "AutoModelForCausalLM": "modeling_internvl_v2pe.InternVLV2PEModel",
}
ARCHITECTURES = (  # those of `FAMILIES` in the modeling file
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)


def check_stride(config_path: Path, stride: int | None) -> None:
    """Refuse a recommended stride where it cannot be one.

    Raises:
        ConfigError: out of range, or the checkpoint was not trained with random strides.
    """
    if stride is None:
        return
    arch = parse_architecture(_values(config_path), str(config_path))
    if not 1 <= stride <= arch.tokens_per_tile:
        raise ConfigError(f"--stride is {stride}, but must lie in 1..{arch.tokens_per_tile}")
    if arch.position_mode == "v2pe_fixed" and arch.position_stride == stride:
        return
    if arch.position_mode != "v2pe_random":
        raise ConfigError(
            f"--stride {stride} recommends one of the strides that were trained at random, but this checkpoint was "
            f"trained with {arch.position_mode} positions"
            + (f" of stride {arch.position_stride}" if arch.position_mode == "v2pe_fixed" else "")
            + "; omit it"
        )


def check_family(config_path: Path, *, to: FolderFormat | None) -> None:
    """Refuse a family or a format that the remote code does not know, before anything is written.

    Args:
        config_path: of the folder that was imported.
        to: format that is written; None is that of the imported folder.

    Raises:
        CheckpointError: names the families that it knows.
    """
    arch = parse_architecture(_values(config_path), str(config_path))
    if (to or arch.folder_format) == "hf-native":
        raise CheckpointError(
            "--remote-code reads the names of the github format; add --format github, or omit it"
        )
    if arch.pyramid is not None:
        raise CheckpointError(
            "--remote-code computes a plain vision tower, and this checkpoint has a pyramid (PIIP): it would answer "
            "without it; omit --remote-code"
        )
    name = arch.language.architecture
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"--remote-code knows {', '.join(ARCHITECTURES)}, but this checkpoint is a {name}; omit it"
        )
    if arch.language.rope_scaling.kind == "yarn":
        raise CheckpointError(
            "--remote-code computes no YaRN frequencies, which rope_scaling of this checkpoint asks for; omit it"
        )


def record_stride(config_path: Path, stride: int | None) -> None:
    """Write the recommended stride into a config.json."""
    if stride is not None and _values(config_path).get("rope_pos_id_stride") != stride:
        _update(config_path, {"rope_pos_id_stride": stride})


def add_remote_code(folder: Path) -> None:
    """Put the two files beside the weights and name them in config.json."""
    source = Path(remote_code.__file__).parent
    for name in FILES:
        shutil.copyfile(source / name, folder / name)
    path = folder / "config.json"
    arch = parse_architecture(_values(path), str(path))
    used = get_template(arch.template)
    template = asdict(used.with_system(arch.system_message) if arch.system_message else used)
    keys = ("system", "user_role", "assistant_role", "separator", "strip_values")
    chat_format = {key: template[key] for key in keys}
    wanted = {
        "architectures": ["InternVLV2PEModel"],
        "auto_map": AUTO_MAP,
        "chat_format": chat_format,
        "force_image_size": arch.image_size,
        "downsample_ratio": arch.downsample_ratio,
        "ps_version": arch.pixel_shuffle_version,
    }
    _update(path, wanted)


def _values(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _update(path: Path, wanted: dict[str, Any]) -> None:
    text = path.read_text(encoding="utf-8")
    end = "\n" if text.endswith("\n") else ""
    write_atomic(path, json.dumps({**json.loads(text), **wanted}, indent=2, ensure_ascii=False) + end)
