"""What a step works on: the pack that a micro batch is, assumed from the configuration or measured from the data.

    data.max_pack_tokens, data.max_sample_tokens, shares       --assumed_pack-->   Pack
    epoch of a planned mixture (lengths, tiles, supervised)    --measured_pack-->  Pack, and the fullest one

Memory is decided by the fullest pack, time by the mean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import PackCounts
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.v2pe.layout import padded_lengths


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One micro batch, before it is cut.

    Attributes:
        document_lengths: tokens of each document, padded to what the layout wants once `padded` was called.
        num_tiles: tiles of the pack.
        supervised_tokens: tokens with a label.
        source: where the numbers come from, for people.
    """

    document_lengths: tuple[int, ...]
    num_tiles: int
    supervised_tokens: int
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack."""
        return sum(self.document_lengths)

    @property
    def counts(self) -> PackCounts:
        """The same for the FLOP formulas."""
        return PackCounts(
            document_lengths=self.document_lengths,
            supervised_tokens=self.supervised_tokens,
            num_tiles=self.num_tiles,
        )

    def padded(self, plan: ParallelPlan, *, pack_multiple: int = 1) -> Pack:
        """Documents, and with the last of them the pack, rounded up as the collator does for a layout."""
        lengths = padded_lengths(
            self.document_lengths, pad_to_multiple=plan.pad_to_multiple, pack_multiple=pack_multiple
        )
        return replace(self, document_lengths=tuple(lengths))


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a configuration does not say about its data.

    Attributes:
        visual_share: share of a pack's tokens that are visual.
        supervised_share: share of a pack's tokens that have a label.
        documents: documents of a pack; 0 means as many of data.max_sample_tokens as fit.
        tiles: tiles of a pack; -1 derives them from `visual_share`.
    """

    visual_share: float = 0.95
    supervised_share: float = 0.05
    documents: int = 0
    tiles: int = -1

    def __post_init__(self) -> None:
        for name, flag in (("visual_share", "--visual-share"), ("supervised_share", "--supervised-share")):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{flag} is {value}, but a share is in [0, 1]")
        if self.documents < 0:
            raise ConfigError(f"--documents is {self.documents}, but must be >= 0")


def assumed_pack(config: RunConfig, arch: InternVLArchitecture, assumptions: Assumptions) -> Pack:
    """A full pack of equally long documents.

    Tiles: the visual share of the tokens over the tokens of a tile, at most `data.max_pack_tiles`.

    Raises:
        ConfigError: more documents than tokens, or more tiles than the pack has room or budget for.
    """
    data = config.data
    count = assumptions.documents or max(1, data.max_pack_tokens // data.max_sample_tokens)
    length = data.max_pack_tokens // count
    if length < 1:
        raise ConfigError(
            f"--documents is {count}, but a pack has data.max_pack_tokens = {data.max_pack_tokens} tokens"
        )
    room = data.max_pack_tokens // arch.tokens_per_tile
    tiles = assumptions.tiles
    if tiles < 0:
        tiles = min(round(assumptions.visual_share * room), data.max_pack_tiles)
    if tiles > min(room, data.max_pack_tiles):
        raise ConfigError(
            f"--tiles is {tiles}, but a pack of {data.max_pack_tokens} tokens has room for {room} tiles of "
            f"{arch.tokens_per_tile} tokens and data.max_pack_tiles is {data.max_pack_tiles}"
        )
    return Pack(
        document_lengths=(length,) * count,
        num_tiles=tiles,
        supervised_tokens=round(assumptions.supervised_share * length * count),
        source="assumed; --measure-data reads data.meta",
    )


def mean_pack(packs: Sequence[Pack]) -> Pack:
    """A pack that costs what the given ones cost on average: tokens, tiles, labels and sum of squared lengths.

    n equal documents of s tokens have n s tokens and n s^2 squared lengths, so s = sum(squares) / sum(tokens) and
    n = tokens / s, rounded to whole documents.
    """
    tokens = sum(pack.num_tokens for pack in packs) / len(packs)
    squares = sum(n * n for pack in packs for n in pack.document_lengths) / len(packs)
    count = max(1, round(tokens * tokens / squares))
    return Pack(
        document_lengths=(round(tokens / count),) * count,
        num_tiles=round(sum(pack.num_tiles for pack in packs) / len(packs)),
        supervised_tokens=round(sum(pack.supervised_tokens for pack in packs) / len(packs)),
        source=f"measured: mean of {len(packs)} planned packs",
    )


def fullest_pack(packs: Sequence[Pack]) -> Pack:
    """The most of everything that any pack has: what memory has to hold."""
    longest = max(packs, key=lambda pack: pack.num_tokens)
    return Pack(
        document_lengths=longest.document_lengths,
        num_tiles=max(pack.num_tiles for pack in packs),
        supervised_tokens=max(pack.supervised_tokens for pack in packs),
        source=f"measured: most of each over {len(packs)} planned packs",
    )
