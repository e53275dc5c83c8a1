"""What a model is given: positions, shards, tiles, text, packs."""
