"""InternVL2 on megatron-core: vision, projector, language, splice, loss."""
