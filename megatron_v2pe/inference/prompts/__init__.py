"""From messages and pictures to token ids, tiles and positions."""
