"""Retrieval by length and stride, and questions of the training format."""
