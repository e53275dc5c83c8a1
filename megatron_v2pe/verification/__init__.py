"""Comparison with recorded numbers, with a second implementation, and bit by bit."""
