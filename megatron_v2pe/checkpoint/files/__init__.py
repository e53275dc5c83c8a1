"""Checkpoint folders as files: manifest, hashes, blocks and byte ranges."""
