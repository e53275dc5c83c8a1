"""Keys and values of what was read: storage, sharing of prefixes, 8-bit form, sizes."""
