"""The section `lora` of a run, which a checkpoint of adapters carries too."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.sections.parts import PARTS
from megatron_v2pe.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters. A part with a rank keeps its own weights; its adapters are trained, also if it is frozen."""

    language_rank: int = 0
    """Rank of the language model's adapters; 0 for none."""
    vision_rank: int = 0
    """Rank of the vision tower's adapters; 0 for none."""
    projector_rank: int = 0
    """Rank of the projector's adapters; 0 for none."""
    alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0 means 2 * rank for each part, as the release does."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training. The release trains with 0.05."""
    targets: tuple[str, ...] = ()
    """Linears with adapters, by their Hugging Face names (wqkv, w1, q_proj, attn.qkv, mlp1.1); empty means all."""

    def __post_init__(self) -> None:
        ranks = {f"lora.{part}_rank": self.rank_of(part) for part in PARTS}
        for name, value in {**ranks, "lora.alpha": self.alpha}.items():
            if value < 0:
                raise ConfigError(f"{name} is {value!r}, but must be >= 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout!r}, but must lie in [0, 1)")
        if not all(isinstance(name, str) for name in self.targets):
            raise ConfigError(f"lora.targets is {self.targets!r}, but must be a list of names")
        changed = [name for name in ("alpha", "dropout", "targets") if getattr(self, name)]
        if changed and not self.is_on:
            raise ConfigError(
                f"lora.{changed[0]} is {getattr(self, changed[0])!r}, but no part has adapters; omit it, or set "
                "lora.language_rank, lora.vision_rank or lora.projector_rank"
            )

    @property
    def is_on(self) -> bool:
        """Whether any part has adapters."""
        return bool(self.language_rank or self.vision_rank or self.projector_rank)

    def rank_of(self, part: str) -> int:
        """Rank of a part's adapters, 0 for none."""
        return getattr(self, f"{part}_rank")

    def alpha_of(self, part: str) -> float:
        """Alpha of a part's adapters."""
        return self.alpha or 2.0 * self.rank_of(part)
