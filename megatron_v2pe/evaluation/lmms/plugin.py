"""Entry point of lmms-eval's plugin group `lmms_eval.models`: the model name `megatron_v2pe`."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval registers."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="megatron_v2pe", chat_class_path="megatron_v2pe.evaluation.lmms.model.HarnessModel"
        )
    ]
