"""The parts of a model, and the field of a run that freezes each."""

from __future__ import annotations

from typing import Literal, get_args

Part = Literal["language", "vision", "projector"]
PARTS: tuple[Part, ...] = get_args(Part)
FREEZE_FIELDS: dict[Part, str] = {
    "language": "model.freeze_language",
    "vision": "vision.freeze",
    "projector": "model.freeze_projector",
}
