"""Sizes of the parallel axes and what follows from them: numbers only, no ranks, no groups, no torch.

    ParallelConfig + world size --resolve--> ParallelPlan --init_distributed (topology)--> ParallelContext

Planning a run and rendering its batch script read these numbers on machines without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.config.schema import ParallelConfig

VOCAB_MULTIPLE = 64  # rows of a GEMM on tensor cores; times tp so that every rank's share is one


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the parallel axes, resolved against the world size. Numbers only.

    Attributes:
        tp: tensor parallel size.
        pp: pipeline parallel size.
        cp: context parallel size.
        dp: data parallel size, what remains of the world.
        vpp: virtual stages of each pipeline rank.
        ep: ranks over which the experts of a layer are spread.
        etp: ranks that split each expert.
        sequence_parallel: activations between layers are split over tp.
        vision: the tower is `replicated` on tp ranks or split over them (`tensor`).
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    vision: Literal["replicated", "tensor"] = "replicated"

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold copies of the same experts and share their optimizer state."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    @property
    def pad_to_multiple(self) -> int:
        """Every document is padded to a multiple of this many tokens.

        2*cp equal zigzag chunks, and a rank's share of them splits over tp under sequence parallelism.
        """
        zigzag_chunks = 2 * self.cp if self.cp > 1 else 1
        return zigzag_chunks * (self.tp if self.sequence_parallel else 1)

    @property
    def shares_tiles_over_tp(self) -> bool:
        """Whether tp ranks encode different tiles.

        They do under sequence parallelism, where each owns a slice of the tokens. Without it all of them need all
        features of their cp shard and encode the same tiles, as they must when the tower itself is split.
        """
        return self.sequence_parallel and self.vision == "replicated"

    @property
    def tile_ranks(self) -> int:
        """Ranks of the first stage that share the tiles of a pack."""
        return self.cp * (self.tp if self.shares_tiles_over_tp else 1)

    @property
    def tower_tp(self) -> int:
        """Tensor parallel size of tower and projector: 1 where every rank holds them whole."""
        return self.tp if self.vision == "tensor" else 1


def resolve(config: ParallelConfig, world_size: int) -> ParallelPlan:
    """Sizes of all axes for a world of `world_size` ranks.

    Raises:
        ConfigError: the world is not a whole number of model replicas.
    """
    return ParallelPlan(
        tp=config.tp,
        pp=config.pp,
        cp=config.cp,
        dp=config.dp(world_size),
        vpp=config.vpp,
        ep=config.ep,
        etp=config.expert_tp,
        sequence_parallel=config.sequence_parallel,
        vision=config.vision,
    )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of embedding and head: the vocabulary rounded up to a multiple of 64 * tp."""
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple
