"""Recorded cases of the PIIP release: its image models around this package's interactions, and this package's tower."""
