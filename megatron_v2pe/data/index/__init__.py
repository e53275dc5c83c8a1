"""Lengths before pixels: each annotation file is measured once."""
