"""Two files that `export-hf --remote-code` puts beside the weights; they need torch and transformers alone."""
