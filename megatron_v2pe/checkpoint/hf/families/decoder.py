"""What the tables of all language models share: names of our decoder, and the prefixes of its layers."""

from __future__ import annotations

HF = "language_model.model.layers.{i}."
"""Prefix of a layer's Hugging Face tensors."""
OURS = "language.decoder.layers.{i}."
"""Prefix of a layer's parameters here."""
EMBEDDING = "language.embedding.word_embeddings.weight"
FINAL_NORM = "language.decoder.final_layernorm.weight"
HEAD = "language.output_layer.weight"
ROTARY = "follows from rope_theta and rope_scaling of config.json"
"""Why rotary frequencies that some checkpoints store are dropped."""
