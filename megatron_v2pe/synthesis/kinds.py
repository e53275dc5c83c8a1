"""Kinds of samples by name, and the plan of a run: which samples, each with an identity of its own.

    kinds x lengths x count --plan--> SampleSpec --compose--> record

What a sample contains depends on its spec and the sources only, so samples can be made in any order by any number of
workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.synthesis.split import Split, generator_for

TEXT_KINDS = ("text-retrieval", "text-counting", "text-reasoning", "text-decoys", "text-absent")
IMAGE_KINDS = (
    "image-retrieval",
    "image-counting",
    "image-decoys",
    "image-absent",
    "image-jigsaw",
    "image-multiview",
)
VQA_KINDS = ("longvqa-pages", "longvqa-paste")
KINDS = (*TEXT_KINDS, *IMAGE_KINDS, *VQA_KINDS)
GROUPS = {
    "text": TEXT_KINDS,
    "image": IMAGE_KINDS,
    "needles": (*TEXT_KINDS, *IMAGE_KINDS),
    "longvqa": VQA_KINDS,
    "all": KINDS,
}


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Identity of one sample.

    Attributes:
        kind: one of KINDS.
        split: whose material.
        tokens: exact length.
        number: 0.. among the samples of this kind and length.
        depth_band: which of `num_depths` equal bands of depth the needle is in.
        num_depths: number of bands.
        seed: seed of the run.
    """

    kind: str
    split: Split
    tokens: int
    number: int
    depth_band: int
    num_depths: int
    seed: int

    @property
    def sample_id(self) -> str:
        """Name of the record."""
        return f"{self.split}-{self.kind}-{self.tokens}-{self.number:06d}"

    def generator(self) -> np.random.Generator:
        """Source of every choice of this sample."""
        return generator_for("synthesize", self.seed, self.split, self.kind, self.tokens, self.number)

    def band_centre(self, depth: float) -> float:
        """Centre of the band that a depth lies in; the depth that reports group by."""
        band = min(int(depth * self.num_depths), self.num_depths - 1)
        return round((band + 0.5) / self.num_depths, 4)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Read `text-retrieval,image-jigsaw` or a group's name.

    Raises:
        ConfigError: an unknown name.
    """
    found: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in GROUPS and name not in KINDS:
            raise ConfigError(
                f"KIND: {name!r} is neither a kind ({', '.join(KINDS)}) nor a group of kinds ({', '.join(GROUPS)})"
            )
        found += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def parse_lengths(text: str) -> tuple[int, ...]:
    """Read `4096,32K,1M`; K and M are 1024 and 1024 * 1024.

    Raises:
        ConfigError: not a length.
    """
    units = {"K": 2**10, "M": 2**20}
    lengths = []
    for name in (part.strip() for part in text.split(",")):
        unit = units.get(name[-1:].upper(), 1)
        digits = name[:-1] if unit > 1 else name
        if not digits.isdecimal() or int(digits) < 1:
            raise ConfigError(f"--tokens: {name!r} in {text!r} is not a length; write 32768, 32K or 1M")
        lengths.append(int(digits) * unit)
    return tuple(dict.fromkeys(lengths))


def plan(
    kinds: Sequence[str],
    lengths: Sequence[int],
    *,
    count: int,
    num_depths: int,
    split: Split,
    seed: int,
) -> list[SampleSpec]:
    """All samples of a run: `count` of each kind and length, bands of depth in turn."""
    return [
        SampleSpec(
            kind=kind,
            split=split,
            tokens=tokens,
            number=number,
            depth_band=number % num_depths,
            num_depths=num_depths,
            seed=seed,
        )
        for kind in kinds
        for tokens in lengths
        for number in range(count)
    ]


def depth_in_band(spec: SampleSpec, random: np.random.Generator) -> float:
    """A depth anywhere in the sample's band."""
    return float((spec.depth_band + random.random()) / spec.num_depths)


def spread_depths(random: np.random.Generator, count: int) -> list[float]:
    """Depths of several needles: one anywhere in each of `count` equal parts."""
    return [float(depth) for depth in (np.arange(count) + random.random(count)) / count]
