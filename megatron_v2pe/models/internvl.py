"""InternVL2: encode tiles, send features to the tokens' owners, splice, decode.

Shape legend: n tiles of this rank, K visual tokens per tile, H hidden, r rows of the local embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_v2pe.batch.packed_batch import FeatureRoute, LocalBatch, tile_shape
from megatron_v2pe.models.language import LanguageModel
from megatron_v2pe.models.memory import is_trained, recomputed
from megatron_v2pe.models.piip.readout import PyramidReadout
from megatron_v2pe.models.projector import Projector, features_to_rows
from megatron_v2pe.models.splice import splice
from megatron_v2pe.models.vision import InternViT

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # noqa: TID251  # the name of the type; the model sends nothing


def keep_rows(features: Tensor, route: FeatureRoute) -> Tensor:
    """The serial router: all rows are needed here, in the order of their slots."""
    return features[route.send_rows]


class InternVL(MegatronModule):
    """One pipeline stage of the model (the whole model when there is one stage).

    Args:
        config: mcore's configuration of the decoder; schedules and DDP read it.
        vision: tower of the first stage, None elsewhere.
        projector: projector of the first stage, or LLaVA's readout of a pyramid; None elsewhere.
        language: this stage's part of the decoder.
        tile_sizes: pixels of a tile's side, of every branch of the vision tower.
        micro_batch_tiles: tiles that are encoded at a time; 0 encodes all at once and recomputes nothing.
        tile_multiple: tiles that are encoded at a time are filled up to a multiple of it with blank ones.
        route_features: port, (features [n*K, H], route) -> [v, H]; differentiable. All ranks of the
            routing group must call it for every micro batch, with or without tiles.
        replica_group: ranks that hold copies of the vision tower; checkpoints write one of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vision: InternViT | None,
        projector: Projector | PyramidReadout | None,
        language: LanguageModel,
        tile_sizes: tuple[int, ...],
        micro_batch_tiles: int = 0,
        tile_multiple: int = 1,
        route_features: Callable[[Tensor, FeatureRoute], Tensor] = keep_rows,
        replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(config)
        self.vision = vision
        self.projector = projector
        self.language = language
        self.tile_sizes = tile_sizes
        self.micro_batch_tiles = micro_batch_tiles
        self.tile_multiple = tile_multiple
        self.route_features = route_features
        self.replica_group = replica_group
        # What mcore's schedules, DDP and gradient finalisation ask of a top-level module.
        self.pre_process = language.pre_process
        self.post_process = language.post_process
        self.vp_stage = language.vp_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised tiles [n, *tile_shape] to feature rows [n*K, H].

        A rank without tiles encodes a blank one (in training) and keeps none of its rows: its parameters still get
        (zero) gradients and its backward pass still joins the routing collective. Ranks may have different
        numbers of slices: nothing in here waits for a rank with other tiles.
        """
        if self.vision is None or self.projector is None:
            raise RuntimeError("this pipeline stage holds no vision tower")
        num_tiles = len(pixels)
        if num_tiles == 0 and not torch.is_grad_enabled():
            return pixels.new_zeros(0, self.config.hidden_size)
        num_blank = -num_tiles % self.tile_multiple if num_tiles else self.tile_multiple
        if num_blank:
            blank = pixels.new_zeros(num_blank, *tile_shape(self.tile_sizes))
            pixels = torch.cat([pixels, blank]) if num_tiles else blank
        slices = pixels.split(self.micro_batch_tiles or len(pixels))
        if len(slices) == 1:
            features = self._features(pixels)
        else:
            features = torch.cat([self._recomputed_features(tiles) for tiles in slices])
        return features_to_rows(features[:num_tiles])

    def _features(self, pixels: Tensor) -> Tensor:
        """[n, *tile_shape] to [n, K, H]."""
        assert self.vision is not None
        assert self.projector is not None
        return self.projector(self.vision(pixels))

    def _recomputed_features(self, pixels: Tensor) -> Tensor:
        """`_features` that keeps only the input of the first trained part: pixels, or the tower's output."""
        assert self.vision is not None
        assert self.projector is not None
        if is_trained(self.vision):
            return recomputed(self._features, pixels)
        hidden = self.vision(pixels)
        return recomputed(self.projector, hidden) if is_trained(self.projector) else self.projector(hidden)

    def forward(self, batch: LocalBatch) -> Tensor | tuple[Tensor, Tensor]:
        """See `LanguageModel.forward` for what is returned."""
        decoder_input = None
        if self.pre_process:
            embedding = self.language.embed(batch.tokens)
            if batch.pixels is not None and batch.route is not None:
                rows = self.route_features(self.encode(batch.pixels), batch.route)
                embedding = splice(embedding, rows, batch.route.slots)
            decoder_input = embedding
        return self.language(batch, decoder_input)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, 1, H] to logits [n, vocab_size]."""
        return self.language.logits(hidden)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the hidden states of the previous stage as input (mcore's schedule calls this)."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Weight that tied embedding and head share (mcore sums its gradient over both stages)."""
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Shards of this stage for mcore's checkpoints.

        Vision and projector are copied over tp as well as over dp and cp, so their replica group is wider
        than the decoder's; without it mcore finds the same shard written twice.
        """
        shards = self.language.sharded_state_dict(f"{prefix}language.", (), metadata)
        wider = dict(metadata or {})
        if self.replica_group is not None:
            wider["dp_cp_group"] = self.replica_group
        for name, part in (("vision", self.vision), ("projector", self.projector)):
            if part is not None:
                shards.update(part.sharded_state_dict(f"{prefix}{name}.", (), wider))
        return shards

    def parts(self) -> dict[str, torch.nn.Module]:
        """The parts that this stage holds, by the names that freezing and reports use."""
        named = {"vision": self.vision, "projector": self.projector, "language": self.language}
        return {name: part for name, part in named.items() if part is not None}
