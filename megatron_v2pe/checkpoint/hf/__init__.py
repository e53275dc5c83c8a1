"""Hugging Face weight folders: files, tables of names, transforms."""
