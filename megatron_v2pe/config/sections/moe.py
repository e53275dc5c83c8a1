"""The section `moe`: how the load of a mixture of experts is balanced, and how full an expert may be."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Training of a mixture of experts (InternVL3.5-20B-A4B, 30B-A3B, 241B-A28B)."""

    aux_loss: float | None = None
    """Strength of the load balancing loss, a mean over layers; empty takes the checkpoint's router_aux_loss_coef, 0 is
    without it, as the release trains Qwen3-MoE. That of GPT-OSS, 0.9, belongs to another loss (on scores that are zero
    outside of the chosen experts): name one, 1e-3 for example."""
    z_loss: float = 0.0
    """Strength of the router's z-loss, a mean over layers and tokens; 0 is without it."""
    capacity_factor: float = 0.0
    """An expert takes at most this many times its even share of a rank's tokens and drops others; 0 takes all."""
    bias_rate: float = 0.0
    """How far the bias of an expert's choice moves in a step towards even use (balancing without a loss; probabilities
    of 128 experts are around 1/128, so 1e-3 is much); 0 is without. The released formats have no place for it, see
    `export-hf --drop-expert-bias`."""

    def __post_init__(self) -> None:
        for name in ("aux_loss", "z_loss", "capacity_factor", "bias_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"moe.{name} is {value}, but must be >= 0")

    @property
    def is_default(self) -> bool:
        """Nothing was set."""
        return self == MoEConfig()
