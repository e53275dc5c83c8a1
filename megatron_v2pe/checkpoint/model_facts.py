"""What a run trains, in a few values by which a resumed run is compared.

    config --> facts --> run state of every checkpoint --> the next start compares --> equal: continue
                                                                             `--> an error that names what changed

A resumed run loads its weights from its own checkpoint, so another model in the configuration would be ignored: the
user wants something else, or made a mistake. Either is reported before any collective.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_identity
from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError

_PATH = "model"  # the path may change, the content may not

logger = logging.getLogger(__name__)


def model_facts(config: RunConfig) -> dict[str, Any]:
    """Start and trained parts of a run, by names of the configuration.

    Raises:
        OSError: the folder vanished.
    """
    model = config.model
    content = (
        _digest_of_hf(Path(model.hf_path)) if model.hf_path else checkpoint_identity(model.checkpoint)[:16]
    )
    return {
        _PATH: str(Path(model.hf_path or model.checkpoint).resolve()),
        "content of the model": content,
        "model.freeze_language": model.freeze_language,
        "model.freeze_projector": model.freeze_projector,
        "vision.freeze": config.vision.freeze,
    }


def _digest_of_hf(folder: Path) -> str:
    """Of a Hugging Face folder, whose weights are too long to hash: config.json, names and sizes of the weights."""
    sizes = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    return hashlib.sha256((folder / "config.json").read_bytes() + repr(sizes).encode()).hexdigest()[:16]


def require_same_model(config: RunConfig, checkpoint: str | Path) -> None:
    """Refuse to resume a run that was started from another model, or trained other parts; no collective.

    Args:
        config: the run as it is now.
        checkpoint: where it would continue; a fact that it lacks is not compared.

    Raises:
        ConfigError: names what differs; `checkpoint.allow_changed_model` makes it a warning.
    """
    saved = RunState.from_json(read_info(checkpoint).run_state).model_facts
    now = model_facts(config)
    changed = [name for name in now if name in saved and saved[name] != now[name]]
    if set(changed) <= {_PATH}:
        return
    lines = "".join(f"\n  {name}: {saved[name]} -> {now[name]}" for name in changed)
    if config.checkpoint.allow_changed_model:
        logger.warning("continuing from %s although its model changed:%s", checkpoint, lines)
        return
    raise ConfigError(
        f"{checkpoint} is of a run with another model; changed:{lines}\n  Its weights would come from that checkpoint, "
        "not from the model. Restore the settings; or start anew with another runtime.run_dir; or, to continue with "
        "the weights of the checkpoint, add checkpoint.allow_changed_model=true"
    )
