"""What a run needs to continue where it stopped, besides tensors: a small typed object, stored as json."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_v2pe.core.errors import CheckpointError, ConfigError

_SHOWN_CHANGES = 12
_FORMER = {"config_hash"}  # in checkpoints of 0.1.0, which never read it
_LATER = {"expert_bias"}  # not in checkpoints of 0.1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a training run after `step` updates.

    Attributes:
        step: optimizer updates done.
        consumed_packs: packs drawn from the plan over all data parallel ranks.
        data_seed: seed of data order and strides.
        data_hash: digest of everything that decides which packs come in which order.
        position_mode: positions that were trained.
        position_stride: stride of `v2pe_fixed`, else 0.
        schedule: state of the learning rate schedule.
        data_facts: what `data_hash` is the hash of, by name, to report what changed.
        recent_losses: of the last applied steps, where `runtime.max_loss_ratio` asks for them.
        model_facts: what is trained, see `model_facts`.
        expert_bias: bias of the choice of experts by sparse layer, see `assembly.expert_bias`; empty is without.
    """

    step: int
    consumed_packs: int
    data_seed: int
    data_hash: str
    position_mode: str = "default"
    position_stride: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    data_facts: dict[str, Any] = field(default_factory=dict)
    recent_losses: tuple[float, ...] = ()
    model_facts: dict[str, Any] = field(default_factory=dict)
    expert_bias: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `checkpoint.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """The state from plain values.

        Raises:
            CheckpointError: keys are missing or unknown.
        """
        known = {item.name for item in fields(cls)}
        if not values:
            raise CheckpointError(
                "the checkpoint holds weights only (it was imported); a run cannot resume from it"
            )
        values = {name: value for name, value in values.items() if name not in _FORMER}
        if set(values) | _LATER != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise CheckpointError(f"the checkpoint's run state and this program's differ in: {odd}")
        return cls(**{**values, "recent_losses": tuple(values["recent_losses"])})

    def require_same_data(self, now: RunState, *, is_change_allowed: bool = False) -> None:
        """Refuse to resume when the order of packs is not the one this state counts in.

        Args:
            now: the state of the run as it is configured now.
            is_change_allowed: log what changed instead; the run continues with the next step of the new plan.

        Raises:
            ConfigError: seed or data settings changed since the checkpoint was written.
        """
        if (self.data_seed, self.data_hash) == (now.data_seed, now.data_hash):
            return
        found = (
            f"the checkpoint stopped after {self.consumed_packs} packs of another plan (data seed {self.data_seed}, "
            f"settings {self.data_hash}; now {now.data_seed}, {now.data_hash})"
        )
        if is_change_allowed:
            logger.warning(
                "%s: continuing with step %d of the new plan%s", found, self.step + 1, self._changes(now)
            )
            return
        raise ConfigError(
            f"{found}; restore the data settings, or start a new run with model.checkpoint set to this checkpoint, or "
            f"add checkpoint.allow_changed_data=true to continue with step {self.step + 1} of the new plan, whose "
            f"samples may have been seen already{self._changes(now)}"
        )

    def _changes(self, now: RunState) -> str:
        """Differences of the data settings, one line each: name, old value, new value."""
        if not self.data_facts or not now.data_facts:
            return ""
        names = list(dict.fromkeys([*self.data_facts, *now.data_facts]))
        changed = [name for name in names if self.data_facts.get(name) != now.data_facts.get(name)]
        lines = [
            f"\n  {name}: {self.data_facts.get(name, 'absent')} -> {now.data_facts.get(name, 'absent')}"
            for name in changed[:_SHOWN_CHANGES]
        ]
        more = len(changed) - len(lines)
        return "; changed:" + "".join(lines) + (f"\n  ... and {more} more" if more else "")
