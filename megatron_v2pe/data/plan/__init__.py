"""Which packs a step trains on."""
