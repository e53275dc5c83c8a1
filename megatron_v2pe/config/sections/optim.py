"""The section `optim` of a run: how long, how much at a time, how fast each part learns, what decays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.config.sections.parts import FREEZE_FIELDS
from megatron_v2pe.config.sections.rules import require
from megatron_v2pe.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay."""

    steps: int = 1000
    """Optimizer updates of the run; the schedule ends here."""
    global_batch_size: int = 0
    """Packs of one update over all data parallel ranks; 0 leaves it to global_batch_tokens, or is 1 where that is 0."""
    global_batch_tokens: int = 0
    """The same in tokens: a multiple of data.max_pack_tokens, whose packs are counted as full; 0 leaves it to
    global_batch_size."""
    batch_rampup: tuple[int, ...] = ()
    """[START, INCREMENT, PACKS] as in Megatron's --rampup-batch-size: steps begin with START packs and grow by
    INCREMENT at a time, evenly over the first PACKS packs; empty has full steps from the first."""
    lr: float = 5e-6
    """Peak learning rate."""
    lr_vision: float | None = None
    """Peak learning rate of the vision tower (of its adapters, where it has some); null means lr."""
    lr_projector: float | None = None
    """Peak learning rate of the projector; null means lr."""
    lr_language: float | None = None
    """Peak learning rate of the language model; null means lr."""
    vision_layer_decay: float = 1.0
    """Learning rate of a vision layer over that of the layer above it, as VIT_LAYER_DECAY_RATE of the release: the last
    of L layers has lr_vision x this, the first lr_vision x this^L, patches and positions lr_vision x this^(L+1)."""
    min_lr: float = 0.0
    """Learning rate at the last step; that of a part with another lr is in the same proportion to it."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay, of the parameters that optim.decay says."""
    decay: Literal["usual", "release"] = "usual"
    """Which parameters decay. usual: matrices, embeddings (class and positions too) and adapters, but neither biases
    nor norms nor layer scale; release: everything, as the release's ZeRO configurations do."""
    beta1: float = 0.9
    """First moment decay."""
    beta2: float = 0.999
    """Second moment decay."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "optim.steps", self.steps, "must be at least 1")
        self._check_batch()
        self._check_rates()
        require(
            0 <= self.warmup_steps < self.steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"must be less than optim.steps = {self.steps}, as the decay needs at least one step, and not negative",
        )
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must be >= 0")
        require(self.eps > 0, "optim.eps", self.eps, "must be positive")

    def _check_batch(self) -> None:
        for name in ("global_batch_size", "global_batch_tokens"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must be >= 0")
        if self.global_batch_size and self.global_batch_tokens:
            raise ConfigError(
                f"optim.global_batch_size is {self.global_batch_size} and optim.global_batch_tokens is "
                f"{self.global_batch_tokens}, but a step is counted in packs or in tokens; set one of the two to 0"
            )
        rampup = self.batch_rampup
        is_triple = len(rampup) == 3 and all(type(number) is int and number > 0 for number in rampup)
        require(
            not rampup or is_triple,
            "optim.batch_rampup",
            list(rampup),
            "must be three positive whole numbers [START, INCREMENT, PACKS], or empty",
        )

    def _check_rates(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, "must lie in [0, optim.lr]")
        for part, switch in FREEZE_FIELDS.items():
            rate = getattr(self, f"lr_{part}")
            rule = f"must be positive, or null for optim.lr; {switch}=true keeps the part as it is"
            require(rate is None or rate > 0, f"optim.lr_{part}", rate, rule)
        require(
            0 < self.vision_layer_decay <= 1,
            "optim.vision_layer_decay",
            self.vision_layer_decay,
            "must lie in (0, 1]; 1 turns it off",
        )

    def lr_of(self, part: str) -> float:
        """Peak learning rate of a part: vision, projector or language."""
        rate = getattr(self, f"lr_{part}")
        return self.lr if rate is None else rate
