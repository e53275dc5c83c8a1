"""Time left, for questions whose cost grows with the square of their length: seconds = a + b n^2."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.evaluation.benchmarks.base import Request

_TOKENS_PER_TILE = 256
_CHARACTERS_PER_TOKEN = 4


def estimated_tokens(request: Request) -> int:
    """Rough length of a prompt, from its characters and its most tiles; only ratios of it are used."""
    total = 0
    for part in request.parts:
        if part.kind == "text":
            total += len(part.text) // _CHARACTERS_PER_TOKEN
        elif part.kind == "video":
            total += part.frames * _TOKENS_PER_TILE
        else:
            tiles = part.max_tiles or request.max_tiles
            total += _TOKENS_PER_TILE * (tiles + (tiles > 1))
    return total


def fit_seconds(lengths: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b n^2 by least squares, neither below zero.

    Example: lengths 10, 20 with 2, 5 seconds give a = 1, b = 0.01.
    """
    count = len(lengths)
    if count == 0:
        return 0.0, 0.0
    squares = [length * length for length in lengths]
    mean_square, mean_time = sum(squares) / count, sum(seconds) / count
    spread = sum((square - mean_square) ** 2 for square in squares)
    if spread == 0:
        return mean_time, 0.0
    b = sum((q - mean_square) * (s - mean_time) for q, s in zip(squares, seconds, strict=True)) / spread
    b = max(0.0, b)
    a = mean_time - b * mean_square
    if a < 0:
        return 0.0, sum(q * s for q, s in zip(squares, seconds, strict=True)) / sum(q * q for q in squares)
    return a, b


class TimeLeft:
    """Learns from answers how long the rest takes.

    Args:
        lengths: of the open questions.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._open_count, self._open_squares = len(lengths), float(sum(n * n for n in lengths))
        self._lengths: list[float] = []
        self._seconds: list[float] = []

    def answered(self, length: int, seconds: float) -> None:
        """Count one answer."""
        self._lengths.append(length)
        self._seconds.append(seconds)
        self._open_count -= 1
        self._open_squares -= float(length * length)

    def seconds(self) -> float | None:
        """Time left; None before the first answer."""
        if not self._lengths:
            return None
        a, b = fit_seconds(self._lengths, self._seconds)
        return a * self._open_count + b * max(0.0, self._open_squares)
