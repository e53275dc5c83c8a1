"""Modules of the Hugging Face model that PEFT knows, for the linears that carry adapters here.

    GitHub   vision_model.encoder.layers.0.attn.qkv            one module for each linear with adapters
    native   model.vision_tower.encoder.layer.0.attention.q_proj, .k_proj, .v_proj      three, whose A is the same

Adapters here belong to GitHub's linears. Where a native model has queries, keys and values apart, B is cut into their
rows, W + B A stays the same; three modules with different A cannot become one linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_v2pe.checkpoint.adapters.weights import AdaptedLinear
from megatron_v2pe.checkpoint.hf.name_map import Entry, NameMap, name_map
from megatron_v2pe.config.arch.architecture import InternVLArchitecture

_GITHUB_PARTS: dict[str, tuple[str, ...]] = {
    "language": ("language_model",),
    "vision": ("vision_model",),
    "projector": ("mlp1",),
}
_NATIVE_PARTS: dict[str, tuple[str, ...]] = {
    "language": ("language_model", "lm_head"),
    "vision": ("vision_tower",),
    "projector": ("multi_modal_projector",),
}


@dataclass(frozen=True)
class PeftModules:
    """Names and rows of the modules of one model.

    Attributes:
        table: names of the model's tensors; in native folders those of transformers' modules, whatever the folder's.
        is_native: see above.
    """

    table: NameMap
    is_native: bool

    @classmethod
    def of(cls, arch: InternVLArchitecture) -> PeftModules:
        """Those of a checkpoint's Hugging Face model."""
        is_native = arch.folder_format != "github"
        return cls(name_map(arch, "hf-native-nested" if is_native else "github"), is_native)

    def names(self, linear: AdaptedLinear) -> tuple[str, ...]:
        """Modules of a linear, in the order of their rows."""
        entry, index = self._place(linear)
        names = entry.hf if index is None else (entry.hf[index],)
        return tuple(name.removesuffix(".weight") for name in names)

    def shapes(self, linear: AdaptedLinear) -> list[tuple[int, ...]]:
        """Rows and columns of each module's weight."""
        entry, index = self._place(linear)
        return list(entry.hf_shapes) if index is None else [entry.hf_shapes[index]]

    def targets(self, linear: AdaptedLinear) -> tuple[str, ...]:
        """Entries of `target_modules`; `q_proj` alone would be in the tower and in the language model."""
        if not self.is_native:
            return (linear.target,)
        return tuple(".".join(name.split(".")[-2:]) for name in self.names(linear))

    def saved_whole(self, part: str, *, is_tied: bool) -> tuple[str, ...]:
        """Entries of `modules_to_save` of a part; a tied head is the embedding."""
        names = (_NATIVE_PARTS if self.is_native else _GITHUB_PARTS)[part]
        return tuple(name for name in names if not (is_tied and name == "lm_head"))

    def split(self, linear: AdaptedLinear, b: Tensor) -> list[Tensor]:
        """B [rows, r] of a linear as that of each of its modules."""
        entry, index = self._place(linear)
        if index is not None:
            return [b]
        return entry.transform.to_hf(linear.entry.transform.to_ours([b]))

    def join(self, linear: AdaptedLinear, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        entry, index = self._place(linear)
        if index is not None:
            return parts[0]
        (b,) = linear.entry.transform.to_hf(entry.transform.to_ours(parts))
        return b

    def _place(self, linear: AdaptedLinear) -> tuple[Entry, int | None]:
        """Entry of the linear's parameter, and which of its tensors the linear is; None where it is all of them."""
        entry = self.table.by_ours[linear.entry.ours]
        return entry, None if len(entry.hf) != len(linear.entry.hf) else linear.index
