"""Import and export: Hugging Face folder <-> checkpoint folder."""
