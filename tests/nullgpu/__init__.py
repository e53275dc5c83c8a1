"""Whole runs in CUDA mode on a GPU that computes nothing; see docs/running.md, "Tests without and with a GPU"."""
