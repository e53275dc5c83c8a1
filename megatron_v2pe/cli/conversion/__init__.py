"""Verbs about checkpoints and their numbers."""
