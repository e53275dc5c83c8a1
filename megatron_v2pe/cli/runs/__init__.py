"""Verbs about training runs and the machines they run on."""
