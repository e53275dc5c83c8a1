"""How keys and values reach the ranks that need them: ring, gather, heads, or not at all."""
