"""A row of the tables in `families`: Hugging Face names <-> our parameter names, read from left to right by import.

A row means: these Hugging Face tensors, of this shape, become this parameter of ours by this transform, or are
dropped for this reason. `{i}` runs over the layers. Sizes in the shape column; tensors of different shapes are
separated by a bar:

    vision    C hidden, M MLP, P positions (patches + class token), S patch side in pixels
    projector K = C / downsample_ratio^2
    language  H hidden, F MLP, A query rows (heads x head_dim), B key rows = value rows (kv heads x head_dim),
              QKV = A + 2 B, V vocabulary

Norms, linears and attention have mcore's names on our side. The state key of a parameter in a checkpoint is its
name here, whatever the parallel layout (see `model_state.SHARDED_STATE_METADATA`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_v2pe.checkpoint.hf.transforms import GroupHeads, Same, StackRows, Transform, VocabularyRows
from megatron_v2pe.config.architecture import InternVLArchitecture

TransformOf = Callable[[InternVLArchitecture], Transform]


def same(arch: InternVLArchitecture) -> Transform:
    """Copied as it is."""
    return Same()


def gate_up(arch: InternVLArchitecture) -> Transform:
    """Gate rows, then up rows."""
    return StackRows(2)


def vision_heads(arch: InternVLArchitecture) -> Transform:
    """[q | k | v] to [q, k, v] per head; InternLM2's `wqkv` is grouped already and needs nothing."""
    heads = arch.vision.num_heads
    return GroupHeads(num_heads=heads, num_kv_heads=heads, head_dim=arch.vision.hidden_size // heads)


def language_heads(arch: InternVLArchitecture) -> Transform:
    """[q | k | v], in one tensor, to rows per kv group (Phi-3)."""
    return _language_heads(arch, is_fused=True)


def separate_language_heads(arch: InternVLArchitecture) -> Transform:
    """q, k and v, each in a tensor of its own, to rows per kv group (Qwen2, Llama)."""
    return _language_heads(arch, is_fused=False)


def _language_heads(arch: InternVLArchitecture, *, is_fused: bool) -> Transform:
    language = arch.language
    return GroupHeads(
        num_heads=language.num_heads,
        num_kv_heads=language.num_kv_heads,
        head_dim=language.head_dim,
        is_fused=is_fused,
    )


def vocabulary(arch: InternVLArchitecture) -> Transform:
    """Stored without padding rows."""
    return VocabularyRows(vocab_size=arch.language.vocab_size, padded_size=arch.language.vocab_size)


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        hf: Hugging Face name patterns; several are parts of one parameter of ours, in order.
        ours: our name pattern; empty when the tensors are dropped.
        shape: symbolic shape of the Hugging Face tensors; empty for dropped ones.
        transform: builds the transform for an architecture.
        reason: why the tensors are dropped.
    """

    hf: tuple[str, ...]
    ours: str = ""
    shape: str = ""
    transform: TransformOf = same
    reason: str = ""
