"""What a run trained with and an answer needs again, kept in config.json beside the weights.

    run --trained_values--> config.json of each step folder, and of what is exported --answer_data--> generate, evaluate

The keys are the release's (`InternVLChatConfig`); `normalize_type` and `max_trained_tokens` are this package's, which
the release ignores. Positions have keys of their own, see `checkpoint.hf.config_json`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.config.schema import MOST_TILES, DataConfig, RunConfig
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.plain_files import read_json_object

logger = logging.getLogger(__name__)
_TILING = ("dynamic_image_size", "use_thumbnail", "pad2square", "min_dynamic_patch", "max_dynamic_patch")
_SHARED = (*_TILING, "normalize_type")
DEFAULTS: dict[str, Any] = {key: getattr(DataConfig(), key) for key in _SHARED}
"""What a config.json without these keys means here."""


def trained_values(
    config: RunConfig, arch: InternVLArchitecture, *, system: str | None = None
) -> dict[str, Any]:
    """Keys and values of config.json that say how a run trained: template, tiling, normalisation, longest sample.

    Args:
        config: the run.
        arch: of the model that it started from.
        system: system text of its samples, empty for the template's; None where they have different ones.
    """
    data = config.data
    own = {} if system is None else {"system_message": system}
    return {
        **own,
        "template": data.template or arch.template,
        **{key: getattr(data, key) for key in _SHARED},
        "max_trained_tokens": data.max_sample_tokens,
    }


def answer_data(hf_folder: str | Path, *, max_dynamic_patch: int | None = None, **others: Any) -> DataConfig:
    """How pictures of a question are cut: as the checkpoint was trained, unless an option says otherwise.

    Args:
        hf_folder: Hugging Face side files of the checkpoint.
        max_dynamic_patch: named by the user; None uses the checkpoint's. Another number than the trained one is
            reported.
        others: fields of `DataConfig` that no checkpoint records.

    Raises:
        ConfigError: the number is out of range.
        CheckpointError: a value of config.json is none that can be.
    """
    if max_dynamic_patch is not None and not 1 <= max_dynamic_patch <= MOST_TILES:
        raise ConfigError(f"--max-dynamic-patch is {max_dynamic_patch}, but must lie in 1..{MOST_TILES}")
    path = Path(hf_folder) / "config.json"
    section = Section(read_json_object(path), str(path))
    own = {key: section.get(key, default) for key, default in DEFAULTS.items()}
    trained = own["max_dynamic_patch"]
    if own["min_dynamic_patch"] > trained:
        raise CheckpointError(
            f"{path}: min_dynamic_patch is {own['min_dynamic_patch']}, more than max_dynamic_patch {trained}"
        )
    if max_dynamic_patch is not None:
        own["max_dynamic_patch"] = max_dynamic_patch
        own["min_dynamic_patch"] = min(own["min_dynamic_patch"], max_dynamic_patch)
        if max_dynamic_patch != trained:
            logger.warning(
                "--max-dynamic-patch is %d, but the config.json of this checkpoint says %d; omit the option to cut "
                "pictures as they were in training",
                max_dynamic_patch,
                trained,
            )
    try:
        return DataConfig(**own, **others)
    except ConfigError as error:
        raise CheckpointError(f"{path}: cannot be used as data settings: {error}") from None
