"""Metrics of published benchmarks as pure functions of texts: no torch, no files."""
