"""PIIP: an image pyramid of smaller networks around the vision tower (arXiv 2406.04330, 2501.07783)."""
