"""Peak memory of a training step on one rank, phase by phase, beside weights, gradients and optimizer state.

    cut       the batch comes to the device
    encode    tower and projector forward                       (first stage)
    decode    decoder layers forward
    loss      head, a loss chunk of logits, gradients of the head    (last stage)
    decode'   decoder layers backward, from the last
    encode'   projector and tower backward                      (first stage)
    embed'    gradient of the embedding                         (first stage)

Each phase holds what earlier ones left for backward. The largest is the peak, and its parts say what to change.
Micro batches in flight on a pipeline add what they keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_v2pe.parallel.plan import padded_vocab_size
from megatron_v2pe.planning.memory.layers.attention import AttentionShape
from megatron_v2pe.planning.memory.layers.decoder import DecoderShape, decoder_layer_ops
from megatron_v2pe.planning.memory.layers.head import HeadPeaks, HeadShape, head_peaks
from megatron_v2pe.planning.memory.layers.operations import FLOAT_BYTES, LayerCosts
from megatron_v2pe.planning.memory.layers.stack import Recompute, Stack, mixed, stack
from megatron_v2pe.planning.memory.layers.vision import VisionPeaks, VisionShape, vision_peaks
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.stages import ModelChunk

SHORT_TOKENS = 512  # documents up to this length share a call of a native kernel
TOKEN_BYTES = 28  # token id, label, position units (8 each), loss weight (4)


@dataclass(frozen=True, kw_only=True)
class ModelChunkMemory:
    """Memory of one micro batch in one model chunk."""

    batch_bytes: float
    cut_bytes: float
    gathered_bytes: float
    hidden_bytes: float
    visual_bytes: float
    embedding_gradient_bytes: float
    tower: VisionPeaks | None
    layers: Stack
    head: HeadPeaks | None

    @property
    def kept_bytes(self) -> float:
        """Held from the end of forward to the start of backward, while other micro batches run."""
        tower = self.tower.kept_bytes if self.tower else 0.0
        return self.batch_bytes + tower + self.layers.kept_bytes + self.hidden_bytes


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A moment of the step: bytes by what they are for."""

    name: str
    parts: dict[str, float]

    @property
    def total_bytes(self) -> float:
        """All of them."""
        return sum(self.parts.values())


def decoder_stack(setting: Setting, num_layers: int, *, fp8_layers: int = 0) -> Stack:
    """Decoder layers of a model chunk, `fp8_layers` of them with FP8 linears."""
    plan, language, model = setting.plan, setting.arch.language, setting.config.model
    longest = setting.longest_local
    gathers = len(setting.pack.document_lengths) > 1 and longest <= SHORT_TOKENS
    experts = language.experts
    sizes = DecoderShape(
        tokens=setting.tokens,
        rows=setting.rows,
        hidden=language.hidden_size,
        query_width=language.num_heads * language.head_dim // plan.tp,
        key_width=language.kv_heads_of_rank(plan.tp) * language.head_dim,
        ffn=language.ffn_size // plan.tp,
        num_heads=language.num_heads // plan.tp,
        head_dim=language.head_dim,
        qkv_bias=language.qkv_bias,
        tp=plan.tp,
        sequence_parallel=plan.sequence_parallel,
        fused_swiglu=setting.fused_swiglu,
        mlp_chunks=model.mlp_chunks if model.recompute == "selective" or model.mlp_chunks > 1 else 0,
        # A chunk with sparse and dense layers counts as sparse: those need more.
        routed_rows=round(setting.routed_rows) if experts else 0,
        expert_ffn=experts.ffn_size // plan.etp if experts else 0,
        num_experts=experts.num_experts if experts else 0,
        local_experts=experts.num_experts // plan.ep if experts else 1,
        clamped=experts is not None and experts.is_clamped,
    )
    shape = AttentionShape(
        tokens=sizes.tokens,
        longest_share=1.0 if gathers else longest / setting.tokens,
        gathers=gathers and setting.attention_backend == "native",
        query_width=sizes.query_width,
        key_width=sizes.key_width,
        num_heads=sizes.num_heads,
        cp=plan.cp,
        comm_type=setting.config.parallel.cp_comm_type,
    )
    costs, saving = setting.costs("language"), (model.recompute, model.offload_activations)
    plain = _decoder_stack(sizes, shape, setting.attention_backend, costs, num_layers, saving)
    if not fp8_layers:
        return plain
    fp8 = _decoder_stack(
        sizes, shape, setting.attention_backend, replace(costs, fp8=True), num_layers, saving
    )
    return mixed(fp8, plain, share=fp8_layers / num_layers)


@lru_cache(maxsize=1024)  # a search asks for the same layers again and again
def _decoder_stack(
    sizes: DecoderShape,
    shape: AttentionShape,
    backend: str,
    costs: LayerCosts,
    num_layers: int,
    saving: tuple[Recompute, bool],
) -> Stack:
    return stack(
        decoder_layer_ops(sizes, shape, backend=backend, costs=costs),
        num_layers=num_layers,
        input_bytes=sizes.rows * sizes.hidden * costs.element_bytes,
        recompute=saving[0],
        offload=saving[1],
    )


def model_chunk_memory(setting: Setting, model_chunk: ModelChunk) -> ModelChunkMemory:
    """Memory of one micro batch in a model chunk."""
    arch, e = setting.arch, setting.element_bytes
    language, plan = arch.language, setting.plan
    hidden = setting.rows * language.hidden_size * e
    vocab_rows = padded_vocab_size(language.vocab_size, plan.tp) // plan.tp
    tokens = setting.tokens * (TOKEN_BYTES + language.head_dim // 2 * FLOAT_BYTES)
    pixels = arch.values_per_tile * setting.tiles if model_chunk.is_first else 0
    visual_share = min(1.0, setting.pack.num_tiles * arch.tokens_per_tile / setting.pack.num_tokens)
    is_half = e < FLOAT_BYTES
    return ModelChunkMemory(
        batch_bytes=tokens + pixels * e,
        # uint8 from the loader, float32 while it is normalised, then the compute dtype
        cut_bytes=tokens + pixels * ((0 if setting.on_cpu else 1) + FLOAT_BYTES + (e if is_half else 0)),
        gathered_bytes=setting.tokens * language.hidden_size * e if plan.sequence_parallel else 0.0,
        hidden_bytes=hidden if plan.pp > 1 else 0.0,
        visual_bytes=hidden * visual_share if model_chunk.is_first else 0.0,
        embedding_gradient_bytes=0.0
        if not (setting.trains("language") and model_chunk.is_first)
        else vocab_rows * language.hidden_size * e,
        tower=_tower(setting) if model_chunk.is_first else None,
        layers=decoder_stack(setting, model_chunk.num_layers, fp8_layers=setting.fp8_layers(model_chunk)),
        head=_head(setting, vocab_rows) if model_chunk.is_last else None,
    )


def _tower(setting: Setting) -> VisionPeaks:
    shape = VisionShape(
        tiles=setting.tiles,
        tower_tp=setting.plan.tower_tp,
        trains_tower=setting.has_gradients("vision"),
        trains_pyramid=setting.trains_pyramid,
        trains_projector=setting.has_gradients("projector"),
        projector=setting.costs("projector"),
    )
    return vision_peaks(setting.arch, setting.config.vision, shape, setting.costs("vision"))


def _head(setting: Setting, vocab_rows: int) -> HeadPeaks:
    model = setting.config.model
    head = HeadShape(
        rows=setting.rows,
        tokens=setting.tokens,
        supervised=min(setting.tokens, setting.pack.supervised_tokens),
        loss_chunk=model.loss_chunk_tokens,
        hidden=setting.arch.language.hidden_size,
        vocab_rows=vocab_rows,
        is_trained=setting.trains("language"),
        gathers=setting.plan.sequence_parallel,
    )
    return head_peaks(head, setting.costs("language"))


def model_chunk_phases(memory: ModelChunkMemory, hidden_bytes: float) -> list[Phase]:
    """Phases of one micro batch in a model chunk; `hidden_bytes` is [r, H]."""
    held = {"batch": memory.batch_bytes}
    if memory.gathered_bytes:
        held["gathered rows"] = memory.gathered_bytes
    phases = [Phase(name="cut", parts={"batch": memory.cut_bytes})]
    tower, layers, head = memory.tower, memory.layers, memory.head
    if tower is not None:
        encode = {**held, "embedding": hidden_bytes, "vision tower": tower.forward_bytes}
        phases.append(Phase(name="encode", parts=encode))
        held["vision tower"] = tower.kept_bytes
        spliced = 2 * hidden_bytes + tower.features_bytes + memory.visual_bytes
        phases.append(Phase(name="splice", parts={**held, "embedding": spliced}))
    phases.append(Phase(name="decode", parts={**held, "decoder layers": layers.forward_bytes}))
    if head is not None:
        loss = {**held, "decoder layers": layers.kept_bytes}
        phases.append(Phase(name="loss", parts={**loss, "logits and loss": head.forward_bytes}))
        phases.append(Phase(name="loss'", parts={**loss, "logits and loss": head.backward_bytes}))
    phases.append(Phase(name="decode'", parts={**held, "decoder layers": layers.backward_bytes}))
    if tower is not None:
        gradients = hidden_bytes + memory.visual_bytes
        encode = {**held, "embedding": gradients, "vision tower": tower.backward_bytes}
        phases.append(Phase(name="encode'", parts=encode))
        embedding = hidden_bytes + memory.embedding_gradient_bytes
        phases.append(Phase(name="embed'", parts={**held, "vision tower": 0.0, "embedding": embedding}))
    return phases
