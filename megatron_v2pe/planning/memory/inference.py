"""Memory of generation and evaluation: weights, the cache of keys and values, and one prefill chunk.

    total = weights + KV cache + most of (tower on a slice of tiles, a decoder layer on a chunk, logits of one token)

Nothing is kept for backward. Context parallel ranks share the cache and every chunk; tiles of a chunk are shared by
tp x cp ranks, as `inference` does it, so what is beside weights and cache does not grow with the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_v2pe.inference.cache.memory import KVKind, kv_shape
from megatron_v2pe.inference.chunks import DEFAULT_CHUNK_TOKENS, MICRO_BATCH_TILES
from megatron_v2pe.planning.memory.activations import decoder_stack
from megatron_v2pe.planning.memory.layers.operations import FLOAT_BYTES
from megatron_v2pe.planning.memory.layers.vision import VisionShape, vision_peaks
from megatron_v2pe.planning.memory.parameters import model_chunk_parameters
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.hardware import GIB, Hardware
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.request.workload import Pack


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes of one pipeline rank while it answers a prompt."""

    weights_bytes: float
    kv_cache_bytes: float
    prefill_bytes: float
    prefill_part: str
    reserved_bytes: float

    @property
    def total_bytes(self) -> float:
        """All of them."""
        return self.weights_bytes + self.kv_cache_bytes + self.prefill_bytes + self.reserved_bytes


def kv_cache_bytes(setting: Setting, num_layers: int, prompt_tokens: int, kv: KVKind) -> float:
    """Of a context parallel rank; the formula that the engine checks before a prefill."""
    shape = kv_shape(
        setting.arch, layers=num_layers, tp=setting.plan.tp, element_bytes=setting.element_bytes, kind=kv
    )
    return shape.row_bytes * prompt_tokens / setting.plan.cp


def chunk_pack(setting: Setting, chunk_tokens: int) -> Pack:
    """One prefill chunk of the prompt."""
    tokens = min(chunk_tokens, setting.pack.num_tokens)
    tiles = min(setting.pack.num_tiles, tokens // setting.arch.tokens_per_tile + 1)
    return replace(setting.pack, document_lengths=(tokens,), num_tiles=tiles)


def past_attention_bytes(setting: Setting) -> float:
    """Attention of a chunk to what is in the cache: queries of all ranks twice, their partial results four times.

    Beside them are what qkv gave and the rotated queries and keys.
    """
    language, e = setting.arch.language, setting.element_bytes
    query = language.num_heads * language.head_dim / setting.plan.tp
    key = language.num_kv_heads * language.head_dim / setting.plan.tp
    return setting.pack.num_tokens * (query * (2 * e + 4 * FLOAT_BYTES) + (2 * query + 3 * key) * e)


def prefill_moments(setting: Setting, model_chunk: ModelChunk) -> dict[str, float]:
    """Bytes beside weights and cache while parts of a stage work on a prefill chunk; `setting.pack` is the chunk."""
    plan = setting.plan
    hidden = setting.tokens * setting.arch.language.hidden_size * setting.element_bytes
    # The chunk's embedding, the layer's input and the norm's output are in the hands of callers.
    moments = {
        "decoder layer": decoder_stack(setting, 1).inference_bytes + 3 * hidden,
        "attention to the past": past_attention_bytes(setting) + 3 * hidden,
    }
    if model_chunk.is_last:
        moments["logits"] = hidden + setting.arch.language.vocab_size * FLOAT_BYTES
    if model_chunk.is_first:
        tiles = max(1, -(-setting.pack.num_tiles // (plan.tp * plan.cp)))
        shape = VisionShape(
            tiles=min(tiles, MICRO_BATCH_TILES),
            tower_tp=plan.tower_tp,
            trains_tower=False,
            trains_projector=False,
            projector=setting.costs("projector"),
        )
        tower = vision_peaks(setting.arch, setting.config.vision, shape, setting.costs("vision"))
        pixels = setting.arch.values_per_tile * tiles * setting.element_bytes
        moments["vision tower"] = pixels + hidden + tower.forward_bytes
    return moments


def inference_memory(
    setting: Setting,
    model_chunks: tuple[ModelChunk, ...],
    hardware: Hardware,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    kv: KVKind = "model",
) -> InferenceMemory:
    """One pipeline rank; as in the engine neither sequence nor tower is split over tp.

    Args:
        setting: layout, model and dtype; its pack is the prompt.
        model_chunks: of the rank.
        hardware: for what the driver and libraries keep.
        chunk_tokens: tokens that are prefilled at a time, as the engine's.
        kv: how keys and values are stored, as the engine's.
    """
    plan = replace(setting.plan, sequence_parallel=False, vision="replicated")
    prompt_tokens = setting.pack.num_tokens
    setting = replace(setting, plan=plan)
    setting = replace(setting, pack=chunk_pack(setting, chunk_tokens).padded(plan))
    model_chunk = ModelChunk(
        num_layers=sum(model_chunk.num_layers for model_chunk in model_chunks),
        is_first=model_chunks[0].is_first,
        is_last=model_chunks[-1].is_last,
    )
    weights = sum(
        size
        for part in model_chunks
        for _, size in model_chunk_parameters(setting.arch, plan, part, setting.config.lora)
    )
    moments = prefill_moments(setting, model_chunk)
    largest = max(moments, key=lambda name: moments[name])
    return InferenceMemory(
        weights_bytes=weights * setting.element_bytes,
        kv_cache_bytes=kv_cache_bytes(setting, model_chunk.num_layers, prompt_tokens, kv),
        prefill_bytes=moments[largest],
        prefill_part=largest,
        reserved_bytes=hardware.reserved_gib * GIB,
    )
