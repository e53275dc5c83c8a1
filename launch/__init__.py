"""Launching runs on SLURM; see submit.py."""
