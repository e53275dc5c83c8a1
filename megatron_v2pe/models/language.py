"""The decoder-only language model: mcore's GPT with V2PE positions and a head that computes its loss in chunks.

    hidden = embedding(tokens)                              first stage; visual rows are spliced in by InternVL
    hidden = layer(hidden, angles(positions))  x num_layers
    total, losses = cross_entropy(head(norm(hidden)), labels, weights)      last stage

Rotary angles are computed from the local tokens' positions on each stage and reach the attention core inside the
packed parameters; mcore itself is configured without position embeddings.

Shape legend: l local tokens (after the context parallel cut), r rows (l, or l / tp between layers with
sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.batch.packed_batch import LocalBatch
from megatron_v2pe.models.layers.elementwise import ElementwiseOps, mlp_with_swiglu
from megatron_v2pe.models.layers.experts import RoutedRows
from megatron_v2pe.models.layers.layer_specs import BackendModules, language_layer_spec
from megatron_v2pe.models.layers.linears import look_up
from megatron_v2pe.models.loss import HeadPorts, weighted_cross_entropy
from megatron_v2pe.models.memory import MemorySavings, RecomputingLayer
from megatron_v2pe.v2pe.rope import RopeSpec, rope_angles


class LanguageModel(GPTModel):
    """GPT whose positions are given, per token, as int64 counts of 1/T.

    Args:
        config: mcore's configuration of the decoder.
        modules: modules of the back end.
        rope: rotary embedding of the checkpoint.
        vocab_size: entries of the vocabulary.
        padded_vocab_size: rows of embedding and head, a multiple of the tensor parallel size.
        memory: what is recomputed; sizes of loss chunks and MLP chunks.
        head_ports: collectives of the head.
        elementwise: how queries and keys are rotated.
        router: builds the router of layers with experts; which layers those are, `config.moe_layer_freq` says.
        share_embeddings_and_output_weights: the head is the embedding.
        groups: mcore's process groups.
        stage: keyword arguments that say which stage this is: pre_process, post_process, vp_stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        modules: BackendModules,
        rope: RopeSpec,
        vocab_size: int,
        padded_vocab_size: int,
        memory: MemorySavings,
        head_ports: HeadPorts,
        elementwise: ElementwiseOps,
        router: Any = None,
        share_embeddings_and_output_weights: bool,
        groups: ProcessGroupCollection | None,
        **stage: Any,
    ) -> None:
        super().__init__(
            config,
            TransformerBlockSubmodules(
                layer_specs=_layer_specs(config, modules, memory, router, vp_stage=stage.get("vp_stage")),
                layer_norm=modules.norm,
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=0,  # only read by learned positions, which this model does not have
            position_embedding_type="none",
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            pg_collection=groups,
            **stage,
        )
        if self.pre_process and not share_embeddings_and_output_weights:
            table = self.embedding.word_embeddings
            table.forward = partial(look_up, table, forward=table.forward)
        self.rope = rope
        self.head_ports = head_ports
        self.elementwise = elementwise
        self.vocab_size = vocab_size
        self.memory = memory
        if memory.offload is not None and self.decoder.final_layernorm is not None:
            self.decoder.final_layernorm.register_forward_pre_hook(self._keep_on_device)

    def _set_attention_backend(self) -> None:
        """mcore would set Transformer Engine's environment for the whole process; see `parallel.attention.te`."""

    def _keep_on_device(self, *_: Any) -> None:
        """What comes after the layers is needed at once in backward."""
        assert self.memory.offload is not None
        self.memory.offload.paused = True

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, l] token ids to [r, 1, H]."""
        return self.embedding(input_ids=tokens, position_ids=None)

    def attention_params(self, batch: LocalBatch) -> V2PEPackedSeqParams:
        """Documents and rotary angles of a micro batch, one object for all layers.

        `cu_seqlens` equal the padded ones: padding counts as real tokens, which earlier tokens never attend to
        under a causal mask. (Automatic padding detection is wrong in Transformer Engine 2.11.)
        """
        return V2PEPackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            cu_seqlens_q_padded=batch.cu_seqlens,
            cu_seqlens_kv_padded=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            rotary_angles=rope_angles(
                batch.position_units,
                self.rope,
                rope_length=batch.rope_length,
                has_fractions=batch.has_fractions,
            ),
            document_lengths=batch.document_lengths or None,
            document_holders=batch.document_holders,
            rotary_scale=self.rope.scaling.attention_factor,
            round_rotary=self.rope.precision == "reference",
            kv_cache=batch.kv_cache,
            rotated=self.elementwise.rotated,
            routed=self.routed_rows(batch),
        )

    def routed_rows(self, batch: LocalBatch) -> RoutedRows | None:
        """What routers must know of the rows of this rank; None without experts, and where nothing is trained."""
        if self.config.num_moe_experts is None or batch.is_token is None or batch.pack_weight is None:
            return None
        return RoutedRows(is_token=self.head_ports.own_rows(batch.is_token), weight=batch.pack_weight)

    def forward(self, batch: LocalBatch, decoder_input: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Run this stage's layers.

        Args:
            batch: this rank's share of a micro batch.
            decoder_input: [r, 1, H] on the first stage, None on later ones (set by `set_input_tensor`).

        Returns:
            Hidden states [r, 1, H]; on the last stage after the final norm, or, when the batch has labels,
            the weighted sum of the local tokens' cross entropies, float32 [], and each of them, float32 [1, l],
            without gradients and 0 where there is no label.
        """
        if decoder_input is not None and self._needs_gradient_entry(decoder_input):
            decoder_input = decoder_input.detach().requires_grad_()
        params = self.attention_params(batch)
        with self._linears_of(batch), self.memory.offload or nullcontext():
            hidden = self.decoder(hidden_states=decoder_input, attention_mask=None, packed_seq_params=params)
        if not self.post_process or batch.labels is None or batch.loss_weights is None:
            return hidden
        return self.loss(hidden, batch.labels, batch.loss_weights, batch.supervised)

    def _linears_of(self, batch: LocalBatch) -> AbstractContextManager[None]:
        """Generation multiplies in bfloat16 where training does in FP8: its rows come in any number."""
        is_generation = self.config.fp8 is not None and batch.kv_cache is not None
        return _without_fp8(self.config) if is_generation else nullcontext()

    def _needs_gradient_entry(self, decoder_input: Tensor) -> bool:
        """Re-entrant recompute gives no gradients at all when its input needs none (frozen parts)."""
        recomputes = self.training and self.config.recompute_granularity is not None
        return recomputes and torch.is_grad_enabled() and not decoder_input.requires_grad

    def loss(
        self, hidden: Tensor, labels: Tensor, weights: Tensor, supervised: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states [r, 1, H], labels and weights [1, l] to their weighted sum and losses [1, l].

        `supervised` are the tokens with a label, int64 [u]; None asks the device, for which the host waits.
        """
        labels = labels.squeeze(0)
        if supervised is None:
            supervised = (labels >= 0).nonzero().squeeze(1)
        rows = self.head_ports.gather_hidden(hidden).squeeze(1)[supervised]
        total, losses = weighted_cross_entropy(
            rows,
            self.head_weight(),
            labels[supervised],
            row_weights=weights.squeeze(0)[supervised],
            vocab_size=self.vocab_size,
            loss_chunk_tokens=self.memory.loss_chunk_tokens,
            ports=self.head_ports,
        )
        return total, losses.new_zeros(len(labels)).index_copy(0, supervised, losses).unsqueeze(0)

    def head_weight(self) -> Tensor:
        """Output projection [V, H] of this rank; the embedding where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, 1, H] to logits [n, vocab_size], gathered over tp."""
        output, _ = self.output_layer(hidden, weight=self.head_weight(), runtime_gather_output=True)
        return output.squeeze(1)[:, : self.vocab_size]


@contextmanager
def _without_fp8(config: TransformerConfig) -> Iterator[None]:
    """The one configuration that all layers of the decoder ask, with FP8 switched off for a moment."""
    kept, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = kept


def _layer_specs(
    config: TransformerConfig,
    modules: BackendModules,
    memory: MemorySavings,
    router: Any,
    *,
    vp_stage: int | None,
) -> list[ModuleSpec]:
    """Specs of this stage's layers; a layer with experts has a router."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    has_experts = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    gated = None if config.bias_activation_fusion else mlp_with_swiglu
    return [
        language_layer_spec(
            modules,
            layer=RecomputingLayer,
            qk_norm=config.qk_layernorm,
            router=router if has_experts[number] else None,
            mlp_chunks=memory.mlp_chunks,
            mlp_forward=None if has_experts[number] else gated,
            row_multiple=memory.row_multiple,
        )
        for number in numbers
    ]
