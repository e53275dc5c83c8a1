"""Hugging Face import and export, sharded checkpoints, run state."""
