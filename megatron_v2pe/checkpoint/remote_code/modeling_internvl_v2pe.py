# mypy: ignore-errors
# Modules that only name the checkpoint's tensors are plain nn.Module, of whose attributes mypy knows nothing.
"""InternVL with fractional visual positions (V2PE) for transformers 4.44 and later; no other package is needed.

    tiles --vision tower, pixel shuffle, mlp1--> features --in place of <IMG_CONTEXT>--> decoder --> tokens

Positions are int64 counts of 1/T (T visual tokens per tile): a text token advances by T, a visual token by the stride,
so they are exact at any length. Angles are formed in float64 and reduced by 2 pi before they are rounded. Written by
megatron_v2pe's `export-hf --remote-code`; `chat` has the signature of the V2PE release.

Shape legend: b prompts, t new tokens, T keys so far, h query heads, k key heads, d head dimension, H hidden.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

from .configuration_internvl_v2pe import InternVLV2PEConfig

CHUNK_TOKENS = 2048  # of a prompt that are computed at a time, which bounds the memory of its attention
IMAGE, IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<image>", "<img>", "</img>", "<IMG_CONTEXT>"
UNDERSTOOD = {  # of a generation_config; anything else is refused rather than ignored
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "num_beams",
    "streamer",
}


FAMILIES = {  # of the decoder, by llm_config.architectures: biases on queries, keys and values; norms on them; MLP
    "InternLM2ForCausalLM": (False, False, "plain"),
    "InternLM3ForCausalLM": (False, False, "plain"),
    "LlamaForCausalLM": (False, False, "plain"),
    "Phi3ForCausalLM": (False, False, "fused"),
    "Qwen2ForCausalLM": (True, False, "plain"),
    "Qwen3ForCausalLM": (False, True, "plain"),
    "Qwen3MoeForCausalLM": (False, True, "experts"),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class VisionAttention(nn.Module):
    """Attention of all patches of a tile to each other."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-6)
        self.num_heads = config["num_attention_heads"]
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.get("qkv_bias", False))
        self.proj = nn.Linear(hidden, hidden)
        is_normed = config.get("qk_normalization", True)
        self.q_norm = RMSNorm(hidden, eps) if is_normed else nn.Identity()
        self.k_norm = RMSNorm(hidden, eps) if is_normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[n, p, H] to the same."""
        query, key, value = self.qkv(x).chunk(3, -1)
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_norm(query), self.k_norm(key), value)
        ]
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """Pre-norm layer with LayerScale."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-6)
        norm = nn.LayerNorm if config.get("norm_type", "rms_norm") == "layer_norm" else RMSNorm
        self.attn = VisionAttention(config)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(hidden, config["intermediate_size"])
        self.mlp.fc2 = nn.Linear(config["intermediate_size"], hidden)
        self.norm1, self.norm2 = norm(hidden, eps=eps), norm(hidden, eps=eps)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """[n, p, H] to the same."""
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) * self.ls2


class VisionModel(nn.Module):
    """InternViT."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, patch = config["hidden_size"], config.get("patch_size", 14)
        self.patch, self.grid = patch, config.get("image_size", 448) // patch
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden))
        self.embeddings.patch_embedding = nn.Conv2d(3, hidden, patch, patch)
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, self.grid**2 + 1, hidden))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(config) for _ in range(config["num_hidden_layers"]))

    def positions(self, grid: int) -> Tensor:
        """Position table, resized bicubically in float32 for another tile size."""
        table = self.embeddings.position_embedding
        if grid == self.grid:
            return table
        image = table[:, 1:].float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2).to(table.dtype)], 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised tiles [n, 3, S, S] to patches [n, p, H], without the class token."""
        patches = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        start = self.embeddings.class_embedding.expand(len(patches), -1, -1)
        x = torch.cat([start, patches], 1) + self.positions(pixel_values.shape[-1] // self.patch)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class KeyValues:
    """Keys and values [b, k, T, d] of one layer; the buffers double when they are full."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self.length = 0

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, k, t, d]; returns all."""
        stop = self.length + key.shape[2]
        if not self._buffers or stop > self._buffers[0].shape[2]:
            shape = (*key.shape[:2], max(stop, 2 * self.length), key.shape[3])
            larger = [key.new_empty(shape) for _ in range(2)]
            for new, old in zip(larger, self._buffers, strict=False):
                new[:, :, : self.length] = old[:, :, : self.length]
            self._buffers = larger
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[:, :, self.length : stop] = new
        self.length = stop
        return self._buffers[0][:, :, :stop], self._buffers[1][:, :, :stop]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [b, heads, t, d] by tables [b, 1, t, d], NeoX halves."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor | None) -> Tensor:
    """Causal attention of the newest t of T tokens; padding is not seen.

    Args:
        query: [b, h, t, d].
        key: [b, k, T, d].
        value: as `key`.
        is_token: bool [b, T], False at padding; None where there is none.
    """
    new, total = query.shape[2], key.shape[2]
    mask = None
    if new > 1 and (new < total or is_token is not None):
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)[None, None]
    if is_token is not None:
        seen = is_token[:, None, None, :]
        mask = seen if mask is None else mask & seen
        # A row of padding sees itself, so that no row is empty; nothing reads what it computes.
        own = torch.arange(total - new, total, device=query.device)
        mask = mask | (torch.arange(total, device=query.device)[None, :] == own[:, None])[None, None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    is_causal = mask is None and new > 1
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)


class InternLM2Layer(nn.Module):
    """One fused projection, grouped by key head: its queries, its key, its value."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        heads, ffn = config["num_attention_heads"], config["intermediate_size"]
        self.key_heads, self.dim = config.get("num_key_value_heads", heads), hidden // heads
        self.group = heads // self.key_heads
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wqkv = nn.Linear(hidden, (heads + 2 * self.key_heads) * self.dim, bias=False)
        self.attention.wo = nn.Linear(heads * self.dim, hidden, bias=False)
        self.feed_forward.w1 = nn.Linear(hidden, ffn, bias=False)
        self.feed_forward.w3 = nn.Linear(hidden, ffn, bias=False)
        self.feed_forward.w2 = nn.Linear(ffn, hidden, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, t, H] to queries [b, t, h, d], keys and values [b, t, k, d]."""
        parts = self.attention.wqkv(self.attention_norm(x)).unflatten(
            -1, (self.key_heads, self.group + 2, self.dim)
        )
        return (
            parts[..., : self.group, :].flatten(2, 3),
            parts[..., self.group, :],
            parts[..., self.group + 1, :],
        )

    def output(self, x: Tensor) -> Tensor:
        """Heads [b, t, h*d] to [b, t, H]."""
        return self.attention.wo(x)

    def mlp_output(self, x: Tensor) -> Tensor:
        """[b, t, H] to the same."""
        x, mlp = self.ffn_norm(x), self.feed_forward
        return mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x))


class GatedMLP(nn.Module):
    """down(silu(gate) * up), the first two in one projection where it is fused."""

    def __init__(self, hidden: int, ffn: int, *, is_fused: bool = False) -> None:
        super().__init__()
        self.is_fused = is_fused
        if is_fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * ffn, bias=False)
        else:
            self.gate_proj = nn.Linear(hidden, ffn, bias=False)
            self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to the same."""
        gate, up = (
            self.gate_up_proj(x).chunk(2, -1) if self.is_fused else (self.gate_proj(x), self.up_proj(x))
        )
        return self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """Each token goes to the `num_experts_per_tok` experts of highest probability, weighted by it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, count = config["hidden_size"], config["num_experts"]
        self.top_k, self.is_normed = config["num_experts_per_tok"], config.get("norm_topk_prob", False)
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(GatedMLP(hidden, config["moe_intermediate_size"]) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, H] to the same; probabilities in float32."""
        tokens = x.flatten(0, 1)
        scores = self.gate(tokens)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        weights, chosen = scores.softmax(-1).topk(self.top_k, -1)
        if self.is_normed:
            weights = weights / weights.sum(-1, keepdim=True)
        weights, out = weights.to(x.dtype), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places].unsqueeze(-1))
        return out.view_as(x)


class LlamaLayer(nn.Module):
    """Llama and the families that name their weights as it does, see `FAMILIES`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        heads, ffn = config["num_attention_heads"], config["intermediate_size"]
        has_bias, self.is_normed, kind = FAMILIES[config["architectures"][0]]
        self.heads, self.key_heads = heads, config.get("num_key_value_heads", heads)
        self.dim, self.is_fused = config.get("head_dim") or hidden // heads, kind == "fused"
        self.self_attn = nn.Module()
        self.mlp = Experts(config) if kind == "experts" else GatedMLP(hidden, ffn, is_fused=self.is_fused)
        widths = {
            "q_proj": heads * self.dim,
            "k_proj": self.key_heads * self.dim,
            "v_proj": self.key_heads * self.dim,
        }
        if self.is_fused:
            self.self_attn.qkv_proj = nn.Linear(hidden, sum(widths.values()), bias=False)
        else:
            for key, width in widths.items():
                setattr(self.self_attn, key, nn.Linear(hidden, width, bias=has_bias))
        if self.is_normed:
            self.self_attn.q_norm, self.self_attn.k_norm = RMSNorm(self.dim, eps), RMSNorm(self.dim, eps)
        self.self_attn.o_proj = nn.Linear(heads * self.dim, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `InternLM2Layer.qkv`."""
        x, part = self.input_layernorm(x), self.self_attn
        if self.is_fused:
            split = [count * self.dim for count in (self.heads, self.key_heads, self.key_heads)]
            flat = part.qkv_proj(x).split(split, -1)
        else:
            flat = (part.q_proj(x), part.k_proj(x), part.v_proj(x))
        query, key, value = (each.unflatten(-1, (-1, self.dim)) for each in flat)
        return (part.q_norm(query), part.k_norm(key), value) if self.is_normed else (query, key, value)

    def output(self, x: Tensor) -> Tensor:
        """Heads [b, t, h*d] to [b, t, H]."""
        return self.self_attn.o_proj(x)

    def mlp_output(self, x: Tensor) -> Tensor:
        """[b, t, H] to the same."""
        return self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """The decoder with its head, named as the family's checkpoints are."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        name = config.get("architectures", ["?"])[0]
        if name not in FAMILIES:
            raise ValueError(f"llm_config.architectures is {name}; known are {', '.join(FAMILIES)}")
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        self.is_internlm2 = name == "InternLM2ForCausalLM"
        layer = InternLM2Layer if self.is_internlm2 else LlamaLayer
        self.model = nn.Module()
        setattr(
            self.model,
            "tok_embeddings" if self.is_internlm2 else "embed_tokens",
            nn.Embedding(vocabulary, hidden),
        )
        self.model.layers = nn.ModuleList(layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = RMSNorm(hidden, config.get("rms_norm_eps", 1e-6))
        if not config.get("tie_word_embeddings", False):
            setattr(
                self, "output" if self.is_internlm2 else "lm_head", nn.Linear(hidden, vocabulary, bias=False)
            )

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding."""
        return self.model.tok_embeddings if self.is_internlm2 else self.model.embed_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] to float32 [..., V]."""
        head = getattr(self, "output" if self.is_internlm2 else "lm_head", None)
        weight = self.embedding.weight if head is None else head.weight
        logits = F.linear(self.model.norm(hidden), weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[KeyValues], is_token: Tensor | None
    ) -> Tensor:
        """New tokens [b, t, H] through all layers, which extend the cache."""
        for layer, kept in zip(self.model.layers, cache, strict=True):
            query, key, value = (part.transpose(1, 2) for part in layer.qkv(x))
            query, key = rotated(query, cos, sin), rotated(key, cos, sin)
            key, value = kept.extend(key, value)
            out = attention(query, key, value, is_token)
            x = x + layer.output(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp_output(x)
        return x


class Rotary:
    """Frequencies of the checkpoint, for one prompt.

    Args:
        llm: `llm_config`.
        is_v2pe: positions are fractional: linear and dynamic scaling give way to plain frequencies, as in the release.
        length: largest whole position plus one, by which dynamic scaling and longrope choose.
    """

    def __init__(self, llm: dict[str, Any], *, is_v2pe: bool, length: int) -> None:
        dim = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
        base, longest = float(llm.get("rope_theta", 10000.0)), llm.get("max_position_embeddings", 2048)
        scaling = llm.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "none"))
        self.factor = 1.0
        if kind in ("linear", "dynamic") and is_v2pe:
            kind = "none"
        if kind == "dynamic" and length > longest:
            growth = scaling["factor"] * length / longest - (scaling["factor"] - 1.0)
            base = base * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        frequencies = base**-exponents
        original = llm.get("original_max_position_embeddings") or scaling.get(
            "original_max_position_embeddings"
        )
        if kind == "linear":
            frequencies = frequencies / scaling["factor"]
        elif kind in ("su", "longrope"):
            factors = scaling["long_factor" if length > original else "short_factor"]
            frequencies = frequencies / torch.tensor(factors, dtype=torch.float64)
            stretch = longest / original
            computed = math.sqrt(1.0 + math.log(stretch) / math.log(original)) if stretch > 1.0 else 1.0
            self.factor = scaling.get("attention_factor") or computed
        elif kind == "llama3":
            frequencies = self._ramp(frequencies, scaling, original)
        elif kind not in ("none", "default", "v2pe", "dynamic"):
            raise ValueError(f"llm_config.rope_scaling has type {kind!r}, which is unknown here")
        self.frequencies = frequencies

    @staticmethod
    def _ramp(frequencies: Tensor, scaling: dict[str, Any], original: int) -> Tensor:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * frequencies / (2.0 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]

    def tables(self, units: Tensor, per_tile: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [b, 1, t, d] of positions in units of 1/per_tile, int64 [b, t]."""
        frequencies = self.frequencies.to(units.device) / per_tile
        angles = torch.remainder(units.double().unsqueeze(-1) * frequencies, 2.0 * math.pi)
        angles = torch.cat([angles, angles], -1).unsqueeze(1).float()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (angles.cos() * self.factor).to(wide), (angles.sin() * self.factor).to(wide)


class InternVLV2PEModel(PreTrainedModel):
    """Load it by AutoModel.from_pretrained(folder, trust_remote_code=True)."""

    config_class = InternVLV2PEConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: InternVLV2PEConfig) -> None:
        super().__init__(config)
        vision, llm = config.vision_config, config.llm_config
        self.ratio = round(1 / getattr(config, "downsample_ratio", 0.5))
        hidden, wide = llm["hidden_size"], vision["hidden_size"] * self.ratio**2
        tile = getattr(config, "force_image_size", None) or vision.get("image_size", 448)
        self.num_image_token = (tile // vision.get("patch_size", 14) // self.ratio) ** 2
        self.vision_model = VisionModel(vision)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.language_model = LanguageModel(llm)
        self.img_context_token_id: int | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight is in the checkpoint."""

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Normalised tiles [n, 3, S, S] to features [n, T, H]."""
        x = self.vision_model(pixel_values.to(self.dtype))
        side = math.isqrt(x.shape[1])
        grid = x.unflatten(1, (side, side))
        step = self.ratio
        parts = [grid[:, down::step, right::step] for down in range(step) for right in range(step)]
        x = torch.cat(parts, -1)
        if getattr(self.config, "ps_version", "v1") == "v1":
            x = x.transpose(1, 2)
        return self.mlp1(x.flatten(1, 2))

    def stride_of(self, version: str | None = None, stride: int | None = None) -> tuple[int, bool]:
        """Units of 1/T that a visual token advances, and whether positions may be fractional."""
        version = version or self.config.rope_pos_id_version
        stride = self.config.rope_pos_id_stride if stride is None else stride
        is_v2pe = self.config.rope_pos_id_version != "default" or version != "default"
        if version == "default":
            return self.num_image_token, is_v2pe
        if not stride:
            raise ValueError("this checkpoint was trained with random strides; give rope_pos_id_stride")
        if not 1 <= stride <= self.num_image_token:
            raise ValueError(f"rope_pos_id_stride is {stride}, but must lie in 1..{self.num_image_token}")
        return int(stride), is_v2pe

    def position_units(self, input_ids: Tensor, attention_mask: Tensor | None, stride: int) -> Tensor:
        """Positions in units of 1/T, int64 [b, t]; the first token of each prompt is at 0."""
        steps = torch.full_like(input_ids, self.num_image_token)
        steps[input_ids == self._context_id()] = stride
        if attention_mask is not None:
            steps = steps * attention_mask.long()
        units = steps.cumsum(-1)
        first = steps if attention_mask is None else steps.masked_fill(attention_mask == 0, 0)
        start = first.gather(1, (first > 0).long().argmax(-1, keepdim=True))
        # A document that begins with a visual token starts at its stride, as a walk from one step before 0 does.
        opening = torch.where(start == stride, torch.full_like(start, self.num_image_token), start)
        return units - opening

    def _context_id(self) -> int:
        if self.img_context_token_id is None:
            raise ValueError("set model.img_context_token_id to the id of <IMG_CONTEXT>, or call chat()")
        return self.img_context_token_id

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        x = self.language_model.embedding(input_ids)
        slots = input_ids == self._context_id()
        count = 0 if pixel_values is None else len(pixel_values) * self.num_image_token
        if int(slots.sum()) != count:
            raise ValueError(
                f"{int(slots.sum())} visual tokens in the text for {count} of {pixel_values is not None} tiles"
            )
        if pixel_values is not None:
            x = x.clone()
            x[slots] = self.extract_feature(pixel_values.to(x.device)).flatten(0, 1).to(x.dtype)
        return x

    def _prefill(
        self, x: Tensor, units: Tensor, rotary: Rotary, attention_mask: Tensor | None
    ) -> tuple[Tensor, list[KeyValues], Tensor | None]:
        """Hidden states of all tokens, computed a chunk at a time."""
        cache = [KeyValues() for _ in self.language_model.model.layers]
        is_token = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        found = []
        for start in range(0, x.shape[1], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            tables = rotary.tables(units[:, part], self.num_image_token, x.dtype)
            seen = None if is_token is None else is_token[:, : part.stop]
            found.append(self.language_model(x[:, part], *tables, cache, seen))
        return torch.cat(found, 1), cache, is_token

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rope_pos_id_version: str | None = None,
        rope_pos_id_stride: int | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits of all tokens, [b, t, V]. Training is megatron_v2pe's; `labels` are refused."""
        if any(value is not None and value is not False for value in unused.values()):
            raise ValueError(f"arguments {', '.join(sorted(unused))} are not known here")
        stride, is_v2pe = self.stride_of(rope_pos_id_version, rope_pos_id_stride)
        units = self.position_units(input_ids, attention_mask, stride)
        rotary = self._rotary(units, is_v2pe)
        x = self._embed(input_ids, pixel_values)
        hidden, _, _ = self._prefill(x, units, rotary, attention_mask)
        return CausalLMOutput(logits=self.language_model.logits(hidden))

    def _rotary(self, units: Tensor, is_v2pe: bool) -> Rotary:
        length = int(units.max()) // self.num_image_token + 1
        return Rotary(self.config.llm_config, is_v2pe=is_v2pe, length=length)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        rope_pos_id_version: str | None = None,
        rope_pos_id_stride: int | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens [b, n], after the end of an answer padding; prompts of different lengths are padded on the left.

        Dynamic scaling keeps the prompt's base for the whole answer.
        """
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        how = self._options(generation_config, options)
        input_ids = input_ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        stride, is_v2pe = self.stride_of(rope_pos_id_version, rope_pos_id_stride)
        units = self.position_units(input_ids, mask, stride)
        rotary = self._rotary(units, is_v2pe)
        hidden, cache, is_token = self._prefill(self._embed(input_ids, pixel_values), units, rotary, mask)
        return self._decode(hidden[:, -1:], units[:, -1:], cache, is_token, rotary, how)

    def _decode(
        self,
        hidden: Tensor,
        units: Tensor,
        cache: list[KeyValues],
        is_token: Tensor | None,
        rotary: Rotary,
        how: dict[str, Any],
    ) -> Tensor:
        processors, streamer, ends = self._processors(how), how.get("streamer"), how["eos_token_id"]
        tokens = torch.zeros(len(hidden), 0, dtype=torch.int64, device=hidden.device)
        is_done = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        if streamer is not None:
            streamer.put(tokens[:, :0].cpu())
        for _ in range(how["max_new_tokens"]):
            scores = processors(tokens, self.language_model.logits(hidden)[:, -1])
            chosen = (
                torch.multinomial(scores.softmax(-1), 1)
                if how["do_sample"]
                else scores.argmax(-1, keepdim=True)
            )
            chosen = chosen.masked_fill(is_done[:, None], how["pad_token_id"])
            tokens = torch.cat([tokens, chosen], 1)
            if streamer is not None:
                streamer.put(chosen[:, 0].cpu())
            for end in ends:
                is_done = is_done | (chosen[:, 0] == end)
            if bool(is_done.all()):
                break
            units = units + self.num_image_token
            if is_token is not None:
                is_token = torch.cat([is_token, torch.ones_like(is_token[:, :1])], 1)
            tables = rotary.tables(units, self.num_image_token, hidden.dtype)
            hidden = self.language_model(self.language_model.embedding(chosen), *tables, cache, is_token)
        if streamer is not None:
            streamer.end()
        return tokens

    def _options(self, generation_config: Any, options: dict[str, Any]) -> dict[str, Any]:
        given = (
            generation_config.to_diff_dict()
            if hasattr(generation_config, "to_diff_dict")
            else generation_config
        )
        how = {"max_new_tokens": 256, "do_sample": False, "eos_token_id": [], **(given or {}), **options}
        how.pop("transformers_version", None)
        unknown = sorted(set(how) - UNDERSTOOD)
        if unknown:
            raise ValueError(
                f"generation options {', '.join(unknown)} are not known here; known: {sorted(UNDERSTOOD)}"
            )
        if how.get("num_beams", 1) != 1:
            raise ValueError(
                "num_beams: beams are searched by `megatron-v2pe generate --num-beams`, not here"
            )
        if how["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens is {how['max_new_tokens']}, but must be at least 1")
        ends = how["eos_token_id"]
        how["eos_token_id"] = [ends] if isinstance(ends, int) else list(ends or [])
        how.setdefault("pad_token_id", (how["eos_token_id"] or [0])[0])
        return how

    def _processors(self, how: dict[str, Any]) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if how.get("repetition_penalty", 1.0) != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
        if how["do_sample"]:
            if how.get("temperature", 1.0) != 1.0:
                found.append(TemperatureLogitsWarper(how["temperature"]))
            if how.get("top_k"):
                found.append(TopKLogitsWarper(how["top_k"]))
            if how.get("top_p", 1.0) < 1.0:
                found.append(TopPLogitsWarper(how["top_p"]))
        return found

    def _query(self, question: str, history: list[tuple[str, str]], num_patches_list: list[int]) -> str:
        """The whole conversation as text, visual tokens spelled out."""
        form = self.config.chat_format
        clean = str.strip if form["strip_values"] else str
        text = form["system"] + form["separator"]
        for old_question, old_answer in history:
            text += form["user_role"] + clean(old_question) + form["separator"]
            text += form["assistant_role"] + clean(old_answer) + form["separator"]
        text += form["user_role"] + clean(question) + form["separator"] + form["assistant_role"]
        count = text.count(IMAGE)
        if count != len(num_patches_list):
            raise ValueError(f"{count} times {IMAGE} in the conversation for {len(num_patches_list)} images")
        for patches in num_patches_list:
            spelled = IMAGE_START + IMAGE_CONTEXT * (self.num_image_token * patches) + IMAGE_END
            text = text.replace(IMAGE, spelled, 1)
        return text

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = IMAGE_START,  # noqa: N803 (names of the release)
        IMG_END_TOKEN: str = IMAGE_END,  # noqa: N803
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT,  # noqa: N803
        verbose: bool = False,
        rope_pos_id_version: str | None = None,
        rope_pos_id_stride: int | None = None,
        num_tiles: Any = None,
    ) -> Any:
        """Answer a question about images; the signature of the release. `num_tiles` follows from the text here.

        Args:
            tokenizer: the checkpoint's.
            pixel_values: normalised tiles [n, 3, S, S] of all images of the conversation, None without images.
            question: with `<image>` where each image belongs; one line of it comes first where there is none.
            generation_config: max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, streamer.
            history: questions and answers so far.
            return_history: return (answer, history).
            num_patches_list: tiles of each image; one image by default.
            IMG_START_TOKEN: as the tokenizer has it.
            IMG_END_TOKEN: as the tokenizer has it.
            IMG_CONTEXT_TOKEN: as the tokenizer has it.
            verbose: print question and answer.
            rope_pos_id_version: `default` for whole positions; the checkpoint's own when None.
            rope_pos_id_stride: units of 1/T of a visual token; the checkpoint's own when None.
            num_tiles: accepted for the release's callers; must agree with `num_patches_list`.
        """
        if (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN) != (IMAGE_START, IMAGE_END, IMAGE_CONTEXT):
            raise ValueError(f"the image tokens are {IMAGE_START}, {IMAGE_END} and {IMAGE_CONTEXT}")
        if history is None and pixel_values is not None and IMAGE not in question:
            question = f"{IMAGE}\n{question}"
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        if num_tiles is not None and [n for row in num_tiles for n in row] != list(num_patches_list):
            raise ValueError(f"num_tiles {num_tiles} and num_patches_list {num_patches_list} disagree")
        answers = self._answers(
            tokenizer,
            pixel_values,
            [self._query(question, history or [], list(num_patches_list))],
            generation_config,
            rope_pos_id_version,
            rope_pos_id_stride,
        )
        if verbose:
            print(question, answers[0])  # noqa: T201 (asked for)
        history = [*(history or []), (question, answers[0])]
        return (answers[0], history) if return_history else answers[0]

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        questions: list[str],
        generation_config: dict[str, Any],
        num_patches_list: list[int] | None = None,
        rope_pos_id_version: str | None = None,
        rope_pos_id_stride: int | None = None,
    ) -> list[str]:
        """Answers of several questions together, one image each, or none."""
        queries = []
        for index, question in enumerate(questions):
            patches = [] if num_patches_list is None else [num_patches_list[index]]
            if patches and IMAGE not in question:
                question = f"{IMAGE}\n{question}"
            queries.append(self._query(question, [], patches))
        return self._answers(
            tokenizer, pixel_values, queries, generation_config, rope_pos_id_version, rope_pos_id_stride
        )

    def _answers(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        queries: list[str],
        generation_config: dict[str, Any],
        version: str | None,
        stride: int | None,
    ) -> list[str]:
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        separator = self.config.chat_format["separator"].strip()
        rows = [list(tokenizer(query)["input_ids"]) for query in queries]
        longest = max(map(len, rows))
        end = tokenizer.convert_tokens_to_ids(separator)
        ids = torch.tensor([[end] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        config = dict(generation_config)
        config.setdefault("eos_token_id", end)
        tokens = self.generate(
            pixel_values,
            ids,
            mask,
            config,
            rope_pos_id_version=version,
            rope_pos_id_stride=stride,
        )
        texts = [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in tokens]
        return [text.split(separator)[0].strip() for text in texts]
