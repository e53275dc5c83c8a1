"""Verbs that score."""
