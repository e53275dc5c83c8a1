"""From annotation files to packed batches."""
