"""A row of a names table: these Hugging Face tensors are this parameter of ours. Data only, no torch.

`{i}` runs over the layers of a part, `{e}` over the experts of a layer. Sizes of the shape column; parts of different
shapes are separated by a bar:

    vision    C hidden, M MLP, P positions (patches + class token), S patch side in pixels
    projector K = C / downsample_ratio^2
    language  H hidden, F MLP, A query rows (heads x head_dim), B key rows = value rows (kv heads x head_dim),
              QKV = A + 2 B, N heads, D head_dim, E experts, I MLP of one expert, V vocabulary

Norms, linears, attention and experts carry mcore's names on our side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TransformName = Literal[
    "same", "gate_up", "vocabulary", "vision_qkv", "vision_q_k_v", "language_qkv", "language_q_k_v"
]
"""How tensors change on the way; `checkpoint.hf.transforms` has the functions of these names."""

Layers = Literal["all", "dense", "sparse"]
"""Layers that have the parameter: every one, those with one MLP, or those with experts."""


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        hf: Hugging Face name patterns; several are parts of one parameter of ours, in order.
        ours: our name pattern; empty when the tensors are dropped.
        shape: symbolic shape of the Hugging Face tensors; empty for dropped ones.
        transform: what happens on the way.
        layers: which layers have it.
        reason: why the tensors are dropped.
    """

    hf: tuple[str, ...]
    ours: str = ""
    shape: str = ""
    transform: TransformName = "same"
    layers: Layers = "all"
    reason: str = ""


L = "language_model.model.layers.{i}."
"""Prefix of a decoder layer in a Hugging Face folder."""
LO = "language.decoder.layers.{i}."
"""Prefix of a decoder layer in ours."""
EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
FINAL_NORM = "language.decoder.final_layernorm.weight"
ROTARY = "follows from rope_theta and rope_scaling of config.json"
