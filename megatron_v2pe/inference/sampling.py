"""How the next token is chosen from its logits.

    logits -> repetition penalty -> no stop token yet (min) -> / temperature -> top-k -> top-p -> min-p -> draw

The order and the meaning of every step are those of Hugging Face's `generate`, which the release calls. Temperature 0
is greedy: the most probable token. A draw depends on (seed, number of the token) alone, never on how many ranks there
are or what else is answered at the time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_v2pe.core.errors import ConfigError

# Logits are float32: of what lies beyond, quotients would be infinite and probabilities no numbers.
_LEAST_TEMPERATURE, _MOST_PENALTY = 1e-20, 1e6
_SEED_STRIDE = 1_000_003  # a prime, so that seeds and numbers of tokens do not meet


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is made.

    Attributes:
        max_new_tokens: longest answer.
        min_new_tokens: no stop token before that many.
        temperature: 0 is greedy; logits are divided by it otherwise.
        top_k: only the k most probable tokens; 0 is all.
        top_p: only the most probable tokens whose probabilities sum up to it.
        min_p: only tokens with that share of the largest probability.
        repetition_penalty: logits of tokens of the answer so far are divided (positive) or multiplied by it.
        seed: of the draws.
        num_beams: beams of a search; 1 is none.
        num_answers: how many of the best beams are returned.
        length_penalty: beams compare by log-probability / tokens ** length_penalty.
        stop: texts at which the answer ends; they are not part of it.

    Raises:
        ConfigError: a value is out of range, or two of them contradict each other.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_beams: int = 1
    num_answers: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "in 0..max_new_tokens"),
            (
                "temperature",
                self.temperature == 0.0 or _LEAST_TEMPERATURE <= self.temperature < float("inf"),
                f"0 (greedy) or positive, at least {_LEAST_TEMPERATURE:g}",
            ),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "at least 0 and below 1"),
            (
                "repetition_penalty",
                1 / _MOST_PENALTY <= self.repetition_penalty <= _MOST_PENALTY,
                f"positive, in {1 / _MOST_PENALTY:g}..{_MOST_PENALTY:g}",
            ),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_answers", 1 <= self.num_answers <= self.num_beams, "in 1..num_beams"),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for name, is_met, rule in rules:
            if not is_met:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be {rule}")
        if self.num_beams > 1 and not self.is_greedy:
            raise ConfigError(
                f"--num-beams is {self.num_beams} and --temperature {self.temperature}, but beams are searched, not "
                "drawn; leave one of them out"
            )
        narrowed = self.top_k or self.top_p < 1.0 or self.min_p
        if self.is_greedy and narrowed:
            raise ConfigError(
                "--top-k, --top-p and --min-p choose among tokens to draw from, but --temperature is 0, which takes "
                "the most probable one; set a temperature or leave them out"
            )

    @property
    def is_greedy(self) -> bool:
        """The most probable token is taken."""
        return self.temperature == 0.0


GREEDY = Sampling()


def adjusted(
    logits: Tensor,
    *,
    sampling: Sampling,
    generated: Sequence[int],
    stop_ids: Collection[int],
    first_index: int,
) -> Tensor:
    """Logits [V_local] after repetition penalty and minimum length; a new tensor where anything changes.

    Args:
        logits: this rank's part of the vocabulary.
        sampling: how the answer is made.
        generated: tokens of the answer so far.
        stop_ids: tokens that end it.
        first_index: vocabulary index of the first column.
    """
    penalised = _local(generated, first_index, len(logits)) if sampling.repetition_penalty != 1.0 else []
    refused = _local(stop_ids, first_index, len(logits)) if len(generated) < sampling.min_new_tokens else []
    if not penalised and not refused:
        return logits
    logits = logits.clone()
    values = logits[penalised]
    penalty = sampling.repetition_penalty
    logits[penalised] = torch.where(values > 0, values / penalty, values * penalty)
    logits[refused] = float("-inf")
    return logits


def _local(tokens: Collection[int], first_index: int, size: int) -> list[int]:
    return sorted({token - first_index for token in tokens if 0 <= token - first_index < size})


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """Whole row [V], float32: temperature, top-k, top-p, min-p; what is left out becomes -inf."""
    logits = logits / sampling.temperature
    out = float("-inf")
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], out)
    if sampling.top_p < 1.0:
        rising, order = logits.sort()
        below = rising.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        below[-1] = False  # the most probable one always stays
        logits = logits.masked_fill(torch.zeros_like(below).scatter(0, order, below), out)
    if sampling.min_p > 0.0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), out)
    return logits


def draw(logits: Tensor, *, sampling: Sampling, number: int) -> int:
    """A token of a whole row [V] of adjusted logits.

    Args:
        logits: float32.
        sampling: how; its temperature is positive.
        number: how many tokens of the answer there are already.
    """
    generator = torch.Generator().manual_seed((sampling.seed * _SEED_STRIDE + number) % 2**63)
    # In float64 on the CPU, so that a draw is the same on every device.
    probabilities = warped(logits, sampling).double().softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
