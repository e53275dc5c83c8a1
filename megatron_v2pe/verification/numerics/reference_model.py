"""InternVL2 in plain PyTorch, straight from Hugging Face names: what `verify-numerics` compares with.

    read("vision_model....")   --vision_states-->  hidden states of the tower, layer by layer
    read("mlp1....")           --features------->  one row for each visual token
    read("language_model....") --decoder_states->  hidden states of the decoder, layer by layer  --logits-->

Written from the released models' structure and sharing no modelling code with the rest of the package: no
megatron-core, no mapping table, no transform, no position units. It is slow and simple on purpose. Weights are read
when their layer runs and dropped after it, so memory holds one layer whatever the size of the model.

Shape legend: n tiles, P patches of a tile, C vision channels, t tokens of all documents, H language channels,
d channels of a head, g kv heads, m query heads of a kv head, e experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.verification.numerics.reference_rope import frequencies

ReadTensor = Callable[[str], Tensor]
"""Hugging Face name -> tensor."""

_INTERNLM2 = {
    "embedding": "model.tok_embeddings",
    "head": "output",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "out": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
_LLAMA = {
    "embedding": "model.embed_tokens",
    "head": "lm_head",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def positions_of(is_visual: Sequence[bool], strides: Sequence[float]) -> list[float]:
    """Positions of one document's tokens: text advances by 1, a visual token by its image's step.

    After an image the next text token has the next whole position (the paper's rule, literally).

    Args:
        is_visual: one entry for each token.
        strides: step of a visual token of each image, in order; an image is an unbroken run of visual tokens.
    """
    positions, last, steps = [], -1.0, iter(strides)
    step, was_visual = 1.0, False
    for visual in is_visual:
        if visual:
            step = step if was_visual else next(steps)
            last += step
        else:
            last = math.ceil(last) + 1.0
        positions.append(last)
        was_visual = visual
    return positions


class ReferenceModel:
    """A whole model that reads its weights as it goes.

    Args:
        arch: architecture, from the config.json beside the weights.
        read: gives a tensor by its Hugging Face name.
        is_v2pe: positions may be fractions; linear and dynamic rope scaling are then off.
        dtype: in which everything is computed; float64 leaves rounding to the other side.
    """

    def __init__(
        self,
        arch: InternVLArchitecture,
        read: ReadTensor,
        *,
        is_v2pe: bool,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.arch = arch
        self.is_v2pe = is_v2pe
        self.dtype = dtype
        self._read_raw = read
        self._names = _INTERNLM2 if arch.language.architecture == "InternLM2ForCausalLM" else _LLAMA

    def read(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, in the dtype of the computation."""
        return self._read_raw(name).to(self.dtype)

    def _linear(self, x: Tensor, name: str, *, bias: bool) -> Tensor:
        return F.linear(x, self.read(f"{name}.weight"), self.read(f"{name}.bias") if bias else None)

    def vision_states(self, pixels: Tensor) -> Iterator[Tensor]:
        """Normalised pixels [n, 3, S, S] to hidden states [n, 1 + P, C]: embeddings, then each layer's output."""
        x = self.vision_embedding(pixels)
        yield x
        for i in range(self.arch.vision.num_layers):
            x = self.vision_layer(i, x)
            yield x

    def vision_embedding(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] to [n, 1 + P, C]: class token and patches, with positions."""
        vision = self.arch.vision
        prefix = "vision_model.embeddings."
        weight = self.read(prefix + "patch_embedding.weight")
        bias = self.read(prefix + "patch_embedding.bias")
        patches = F.conv2d(pixels.to(self.dtype), weight, bias, stride=vision.patch_size)
        patches = patches.flatten(2).transpose(1, 2)  # [n, C, side, side] -> [n, P, C]
        token = self.read(prefix + "class_embedding").expand(len(pixels), 1, -1)
        return torch.cat([token, patches], dim=1) + self._vision_positions(
            pixels.shape[-1] // vision.patch_size
        )

    def vision_layer(self, number: int, x: Tensor) -> Tensor:
        """One layer of the tower, counted from 0: [n, 1 + P, C] to the same shape."""
        layer = f"vision_model.encoder.layers.{number}."
        x = x + self._vision_attention(layer, self._vision_norm(layer + "norm1", x)) * self.read(
            layer + "ls1"
        )
        inner = F.gelu(self._linear(self._vision_norm(layer + "norm2", x), layer + "mlp.fc1", bias=True))
        return x + self._linear(inner, layer + "mlp.fc2", bias=True) * self.read(layer + "ls2")

    def _vision_positions(self, side: int) -> Tensor:
        table = self.read("vision_model.embeddings.position_embedding")
        own = math.isqrt(table.shape[1] - 1)
        if own == side:
            return table
        image = table[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2)], dim=1)

    def _vision_norm(self, name: str, x: Tensor) -> Tensor:
        eps = self.arch.vision.norm_eps
        if self.arch.vision.norm_type == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], self.read(f"{name}.weight"), self.read(f"{name}.bias"), eps)
        return _rms_norm(x, self.read(f"{name}.weight"), eps)

    def _vision_attention(self, layer: str, x: Tensor) -> Tensor:
        vision = self.arch.vision
        q, k, v = self._linear(x, layer + "attn.qkv", bias=vision.qkv_bias).chunk(3, dim=-1)
        if vision.qk_normalization:
            q = self._vision_norm(layer + "attn.q_norm", q)
            k = self._vision_norm(layer + "attn.k_norm", k)
        q, k, v = (part.unflatten(-1, (vision.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = written_out_attention(q, k, v, is_causal=False).transpose(1, 2).flatten(2)
        return self._linear(mixed, layer + "attn.proj", bias=True)

    def features(self, hidden: Tensor) -> Tensor:
        """The tower's last hidden states [n, 1 + P, C] to rows [n * K, H]: pixel shuffle, norm, two linears."""
        step = round(1 / self.arch.downsample_ratio)
        side = math.isqrt(hidden.shape[1] - 1)
        grid = hidden[:, 1:].unflatten(1, (side, side))
        x = torch.cat([grid[:, dy::step, dx::step] for dy in range(step) for dx in range(step)], dim=-1)
        if self.arch.pixel_shuffle_version == "v1":
            x = x.transpose(1, 2)
        x = x.flatten(0, 2)
        x = F.layer_norm(x, x.shape[-1:], self.read("mlp1.0.weight"), self.read("mlp1.0.bias"), 1e-5)
        return self._linear(F.gelu(self._linear(x, "mlp1.1", bias=True)), "mlp1.3", bias=True)

    def embed(self, tokens: Tensor, features: Tensor, slots: Tensor) -> Tensor:
        """Token embeddings [t, H] of `tokens` with `features` [v, H] in the places `slots` [v]."""
        x = self._read_raw(f"language_model.{self._names['embedding']}.weight")[tokens].to(self.dtype)
        x[slots] = features
        return x

    def decoder_states(self, x: Tensor, positions: Tensor, documents: Sequence[int]) -> Iterator[Tensor]:
        """Hidden states [t, H]: after each layer, then after the final norm.

        Args:
            x: decoder input [t, H].
            positions: float64 [t].
            documents: where each document starts, and the end; attention never crosses them.
        """
        language, names = self.arch.language, self._names
        angles = self._angles(positions)
        for i in range(language.num_layers):
            layer = f"language_model.model.layers.{i}."
            normed = _rms_norm(x, self.read(f"{layer}{names['norm1']}.weight"), language.norm_eps)
            window = language.window if language.is_windowed and language.is_windowed[i] else 0
            x = x + self._language_attention(layer, normed, angles, documents, window=window)
            normed = _rms_norm(x, self.read(f"{layer}{names['norm2']}.weight"), language.norm_eps)
            experts = language.experts
            is_sparse = experts is not None and experts.is_sparse[i]
            if experts is not None and experts.is_clamped:
                x = x + self._clamped_experts(layer, normed)
            else:
                x = x + (self._experts(layer, normed) if is_sparse else self._gated_mlp(layer, normed))
            yield x
        yield _rms_norm(x, self.read("language_model.model.norm.weight"), language.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [r, H] to logits [r, V]."""
        tied = self.arch.language.tie_word_embeddings
        return self._linear(
            hidden, f"language_model.{self._names['embedding' if tied else 'head']}", bias=False
        )

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [t, 1, d]."""
        turns = torch.outer(positions.double(), frequencies(self.arch, positions, is_v2pe=self.is_v2pe))
        angles = torch.cat([turns, turns], dim=-1).unsqueeze(1)
        scale = self.arch.language.rope_scaling.attention_factor
        return (angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)

    def _language_attention(
        self, layer: str, x: Tensor, angles: tuple[Tensor, Tensor], documents: Sequence[int], *, window: int
    ) -> Tensor:
        language = self.arch.language
        sinks = self.read(layer + "self_attn.sinks") if language.sinks else None
        q, k, v = self._queries_keys_values(layer, x)
        q, k = _rotated(q, *angles), _rotated(k, *angles)
        groups = language.num_heads // language.num_kv_heads
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # [t, heads, d] -> [heads, t, d]
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        mixed = [
            written_out_attention(
                *(part[:, start:stop] for part in (q, k, v)), is_causal=True, window=window, sinks=sinks
            )
            for start, stop in pairwise(documents)
        ]
        joined = torch.cat(mixed, dim=1).transpose(0, 1).flatten(1)
        return self._linear(joined, layer + self._names["out"], bias=language.proj_bias)

    def _queries_keys_values(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, H] to [t, g m, d], [t, g, d], [t, g, d]."""
        language = self.arch.language
        g, d = language.num_kv_heads, language.head_dim
        m = language.num_heads // g
        if language.architecture == "InternLM2ForCausalLM":
            grouped = self._linear(x, layer + "attention.wqkv", bias=False).unflatten(-1, (g, m + 2, d))
            return grouped[:, :, :m].flatten(1, 2), grouped[:, :, m], grouped[:, :, m + 1]
        if language.architecture == "Phi3ForCausalLM":
            fused = self._linear(x, layer + "self_attn.qkv_proj", bias=False)
            parts = fused.split([g * m * d, g * d, g * d], dim=-1)
        else:
            parts = tuple(
                self._linear(x, f"{layer}self_attn.{kind}_proj", bias=language.qkv_bias) for kind in "qkv"
            )
        q, k, v = (part.unflatten(-1, (-1, d)) for part in parts)
        if language.qk_norm:
            q = _rms_norm(q, self.read(layer + "self_attn.q_norm.weight"), language.norm_eps)
            k = _rms_norm(k, self.read(layer + "self_attn.k_norm.weight"), language.norm_eps)
        return q, k, v

    def _experts(self, layer: str, x: Tensor) -> Tensor:
        """Each token through its `top_k` experts, weighted by the router's softmax."""
        experts = self.arch.language.experts
        assert experts is not None
        weights, chosen = (
            self._linear(x, layer + "mlp.gate", bias=False).softmax(-1).topk(experts.top_k, dim=-1)
        )
        if experts.normalizes_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(x)
        for e in range(experts.num_experts):
            rows, ranks = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                expert = f"{layer}mlp.experts.{e}."
                inner = F.silu(self._linear(x[rows], expert + "gate_proj", bias=False))
                inner = inner * self._linear(x[rows], expert + "up_proj", bias=False)
                out = self._linear(inner, expert + "down_proj", bias=False)
                mixed[rows] += out * weights[rows, ranks, None]
        return mixed

    def _clamped_experts(self, layer: str, x: Tensor) -> Tensor:
        """GPT-OSS: tensors of all experts, input-major, gate and up in alternating columns, biases everywhere."""
        experts = self.arch.language.experts
        assert experts is not None
        best, chosen = self._linear(x, layer + "mlp.router", bias=True).topk(experts.top_k, dim=-1)
        weights = best.softmax(-1)
        first, first_bias, second, second_bias = (
            self.read(f"{layer}mlp.experts.{name}")
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        )
        mixed = torch.zeros_like(x)
        for e in range(experts.num_experts):
            rows, ranks = (chosen == e).nonzero(as_tuple=True)
            both = x[rows] @ first[e] + first_bias[e]
            gate = both[:, 0::2].minimum(both.new_tensor(experts.clamp))
            up = both[:, 1::2].clip(-experts.clamp, experts.clamp)
            inner = (up + 1.0) * gate / (1.0 + torch.exp(-1.702 * gate))
            mixed[rows] += (inner @ second[e] + second_bias[e]) * weights[rows, ranks, None]
        return mixed

    def _gated_mlp(self, layer: str, x: Tensor) -> Tensor:
        if self.arch.language.architecture == "Phi3ForCausalLM":
            gate, up = self._linear(x, layer + "mlp.gate_up_proj", bias=False).chunk(2, dim=-1)
        else:
            gate = self._linear(x, layer + self._names["gate"], bias=False)
            up = self._linear(x, layer + self._names["up"], bias=False)
        return self._linear(F.silu(gate) * up, layer + self._names["down"], bias=False)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def written_out_attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, window: int = 0, sinks: Tensor | None = None
) -> Tensor:
    """Softmax attention over the last but one dimension, written out.

    Args:
        q: queries, [..., heads, t, d].
        k: keys.
        v: values.
        is_causal: a token sees itself and those before it.
        window: of these the last so many; 0 is all.
        sinks: [heads], a logit more for each query, whose probability goes nowhere.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if window:
            allowed = allowed.triu(1 - window)
        scores = scores.masked_fill(~allowed, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    extra = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1] @ v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, the halves of a head turned against each other."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
