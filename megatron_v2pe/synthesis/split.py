"""Training and evaluation never share material: a hash of its content decides for each passage, image and name.

The decision depends on the content alone, so it stays the same when a folder grows, and the two splits may be made by
two commands on two machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Split = Literal["train", "eval"]
T = TypeVar("T")


def digest(content: bytes | str) -> str:
    """32 hexadecimal digits that name a content."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def split_of(content_digest: str, *, held_out: float) -> Split:
    """The split that a content belongs to; a share `held_out` of all contents is for evaluation."""
    return "eval" if int(content_digest[:15], 16) < held_out * 16**15 else "train"


def names_of(split: Split, names: Sequence[T], *, held_out: float = 0.25) -> list[T]:
    """Members of a fixed list of names that a split may use."""
    return [name for name in names if split_of(digest(repr(name)), held_out=held_out) == split]


def generator_for(*identity: object) -> np.random.Generator:
    """Random numbers that depend on the given identity only, not on order or workers."""
    seed = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(seed, "little"))
