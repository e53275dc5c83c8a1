"""What a server counts, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megatron_v2pe.inference.serve.wire import Usage

_FIRST_TOKEN_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_TOKEN_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Metrics:
    """Counters of one server; several of them in a process do not share any."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("v2pe_requests", "Requests by status of HTTP", ["status"], registry=registry)
        self._prompt = Counter("v2pe_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter(
            "v2pe_cached_tokens", "Tokens of prompts that were known already", registry=registry
        )
        self._generated = Counter("v2pe_generated_tokens", "Tokens of answers", registry=registry)
        self._waiting = Gauge("v2pe_waiting_requests", "Requests in the queue", registry=registry)
        self._running = Gauge("v2pe_running_requests", "Requests being answered", registry=registry)
        self._first = Histogram(
            "v2pe_first_token_seconds",
            "From arrival to the first token",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._token = Histogram(
            "v2pe_token_seconds",
            "A forward pass over one token of each answer",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )

    def note_request(self, status: int) -> None:
        """A request ended with this status."""
        self._requests.labels(str(status)).inc()

    def note_load(self, *, waiting: int, running: int) -> None:
        """Requests at this moment."""
        self._waiting.set(waiting)
        self._running.set(running)

    def note_first_token(self, seconds: float, usage: Usage) -> None:
        """A prompt was prefilled."""
        self._first.observe(seconds)
        self._prompt.inc(usage.prompt)
        self._cached.inc(usage.cached)
        self._generated.inc()

    def note_tokens(self, count: int, seconds: float) -> None:
        """A forward pass over new tokens."""
        self._generated.inc(count)
        self._token.observe(seconds)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
