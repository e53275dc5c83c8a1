"""The parts of a model, and the field of a run that freezes each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

PYRAMID = "pyramid"
"""Smaller branches and interactions around the vision tower, where those are trained and the tower itself is not."""
_NEW_PREFIXES = ("vision.branches.", "vision.interactions.")

Part = Literal["language", "vision", "projector"]
PARTS: tuple[Part, ...] = get_args(Part)
FREEZE_FIELDS: dict[Part, str] = {
    "language": "model.freeze_language",
    "vision": "vision.freeze",
    "projector": "model.freeze_projector",
}


def part_of(name: str) -> str:
    """The part of a parameter, or of its key in a checkpoint; new parameters of a pyramid are a part of their own."""
    return PYRAMID if name.startswith(_NEW_PREFIXES) else name.partition(".")[0]


def is_in(name: str, parts: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of some parts; the vision part has its pyramid in it."""
    parts = tuple(parts)
    return part_of(name) in parts or name.partition(".")[0] in parts
