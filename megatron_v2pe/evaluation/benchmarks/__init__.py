"""Published benchmarks: what each asks, and what its answers are worth. No torch, no model."""
