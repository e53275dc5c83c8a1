"""Benchmarks, golden checks, reports."""
