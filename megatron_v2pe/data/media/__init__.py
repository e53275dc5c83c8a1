"""Images and videos: size, tiles, pixels."""
