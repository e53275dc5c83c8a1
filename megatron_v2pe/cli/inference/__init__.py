"""Verbs that answer."""
